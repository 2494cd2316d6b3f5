"""Healing on numbers: what is trained, what a cached prefix changes, what a low rank can reach (HEAL-*)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from preln.base.errors import MissingExtraError
from preln.testing.checks.branches import Block, draw_stacks, hidden_states
from preln.testing.checks.llamas import llama, with_adapters
from preln.testing.layers import dense_sigma
from preln.testing.properties import Property, Worst
from preln.theory import Evidence

PUBLISHED = {"LoRA": 15_728_640, 0: 525_340_672, 1: 743_452_672, 2: 961_564_672, 3: 1_179_676_672}
"""Trainable parameters on Llama-3.1-8B less 8 blocks: rank-8 LoRA on every linear map of the blocks; final
norm, head and the last 0 to 3 blocks."""
RANK = 8


def heal_params(rounds: int) -> list[Evidence]:
    """Count the parameters of real modules, at the published size and at random small ones."""
    from preln.theory.healing import LLAMA_31_8B, lora_parameters, tail_parameters

    published = Worst(
        "parameters of Llama-3.1-8B less 8 blocks, from modules on meta, against the claim", 0.0
    )
    formula = Worst("parameters of Llama modules on meta against the formula: difference", 0.0)
    generator = torch.Generator().manual_seed(30)
    configs = [dict(LLAMA_31_8B)] + [_random_config(generator) for _ in range(rounds)]
    try:
        for config in configs:
            shapes = torch.tensor([list(config.values())])
            model = llama(config, "meta")
            for blocks in range(min(4, config["num_hidden_layers"] + 1)):
                counted = _tail_size(model, blocks)
                formula.update(_gap(counted, tail_parameters(config, blocks)), shapes, blocks=blocks)
                if config == LLAMA_31_8B:
                    published.update(_gap(counted, PUBLISHED[blocks]), shapes, blocks=blocks)
            counted = _adapter_size(model, RANK)
            formula.update(_gap(counted, lora_parameters(config, RANK)), shapes, rank=RANK)
            if config == LLAMA_31_8B:
                published.update(_gap(counted, PUBLISHED["LoRA"]), shapes, rank=RANK)
    except MissingExtraError:
        return []
    return [published.evidence(), formula.evidence()]


def _gap(counted: int, expected: int) -> Tensor:
    return torch.tensor([abs(counted - expected)])


def _random_config(generator: torch.Generator) -> dict[str, int]:
    """Draw a small shape: grouped or full attention, a head size that need not divide the hidden size."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    groups = draw(1, 3)
    kv = draw(1, 3)
    return {
        # transformers wants a multiple of the heads, though nothing else needs one
        "hidden_size": groups * kv * draw(1, 8),
        "intermediate_size": draw(3, 60),
        "num_attention_heads": groups * kv,
        "num_key_value_heads": kv,
        "head_dim": 2 * draw(1, 8),
        "vocab_size": draw(5, 90),
        "num_hidden_layers": draw(1, 4),
    }


def _tail_size(model: Any, blocks: int) -> int:
    """Count the parameters of the head, the final norm and the last blocks."""
    layers = model.model.layers
    parts = [model.lm_head, model.model.norm, *layers[len(layers) - blocks :]]
    return sum(p.numel() for part in parts for p in part.parameters())


def _adapter_size(model: Any, rank: int) -> int:
    """Count peft's trainable parameters; without peft, r (in + out) for each linear map of the blocks."""
    try:
        return sum(p.numel() for p in with_adapters(model, rank).parameters() if p.requires_grad)
    except MissingExtraError:
        maps = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        return sum(rank * (m.in_features + m.out_features) for m in maps)


def train_tail(tail: list[Block], head: Tensor, batches: Iterable[Tensor]) -> list[Tensor]:
    """Train the tail's matrices and the head with AdamW; return them.

    Args:
        tail: the trained blocks; left as they are.
        head: `[vocabulary, d]`; left as it is.
        batches: what enters the tail at each step, `[n, T, d]`.
    """
    weights = [block.branch.weights.clone().requires_grad_() for block in tail]
    out = head.clone().requires_grad_()
    optimizer = torch.optim.AdamW([*weights, out], lr=1e-2, weight_decay=0.1)
    live = [Block(b.norm, replace(b.branch, weights=w)) for b, w in zip(tail, weights, strict=True)]
    for x in batches:
        logits = hidden_states(live, x)[-1] @ out.mT
        target = torch.arange(x.shape[1]).expand(x.shape[:2]) % len(out)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    return [w.detach() for w in (*weights, out)]


def heal_prefix(rounds: int) -> list[Evidence]:
    """Train the tail behind its frozen prefix and on cached outputs: the same parameters, bit for bit."""
    worst = Worst("the tail after 5 steps of AdamW, behind its frozen prefix against on cached outputs", 0.0)
    moved = Worst("the same parameters must have left their start: 1 where they have not", 0.0)
    for blocks, x in draw_stacks(seed=31, rounds=rounds):
        prefix, tail = blocks[:2], blocks[2:]
        head = x.new_ones(5, x.shape[-1]).tril() / 3
        batches = [x.roll(step, 0) + step for step in range(5)]
        # Batch by batch, as training would see them: other batch sizes may round otherwise.
        with torch.no_grad():
            cached = [hidden_states(prefix, batch)[-1] for batch in batches]
        through = train_tail(tail, head, (hidden_states(prefix, batch)[-1] for batch in batches))
        stored = train_tail(tail, head, cached)
        start = [*(b.branch.weights for b in tail), head]
        for one, two, first in zip(through, stored, start, strict=True):
            worst.update((one - two).abs().max()[None], x)
            moved.update((one == first).all()[None].double(), x)
    return [worst.evidence(), moved.evidence()]


def heal_rank(rounds: int) -> list[Evidence]:
    """Compare sigma_{r+1} with what truncation, random and fitted matrices of rank r reach."""
    attained = Worst("sigma(E - truncated SVD of rank r) against sigma_{r+1}(E): difference over sigma(E)")
    unbeaten = Worst(
        "random and fitted matrices of rank r against sigma_{r+1}(E): share by which they beat it"
    )
    generator = torch.Generator().manual_seed(32)
    for rows, columns in ((1, 1), (2, 2), (3, 5), (6, 4), (8, 8)) * (1 + rounds // 3):
        error = torch.randn(4, rows, columns, dtype=torch.float64, generator=generator)
        u, values, v = torch.linalg.svd(error, full_matrices=False)
        for rank in range(1, min(rows, columns) + 1):
            limit = values[:, rank] if rank < values.shape[-1] else torch.zeros_like(values[:, 0])
            left, right = u[..., :rank] * values[:, None, :rank], v[:, :rank]
            reached = dense_sigma(error - left @ right)
            attained.update((reached - limit).abs() / values[:, 0], error, rank=rank)
            for scale in (0.01, 1.0):
                near = left + scale * torch.randn(left.shape, dtype=left.dtype, generator=generator)
                free = scale * torch.randn(right.shape, dtype=left.dtype, generator=generator)
                for product in (near @ right, near @ (right + free), _fitted(error, near, right + free)):
                    beaten = (limit - dense_sigma(error - product)).clamp(min=0)
                    unbeaten.update(beaten / values[:, 0], error, rank=rank)
    return [attained.evidence(), unbeaten.evidence()]


def _fitted(error: Tensor, left: Tensor, right: Tensor, steps: int = 4) -> Tensor:
    """Return a product after descending on the spectral norm of what it misses."""
    factors = [left.clone().requires_grad_(), right.clone().requires_grad_()]
    optimizer = torch.optim.Adam(factors, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.linalg.matrix_norm(error - factors[0] @ factors[1], 2).sum().backward()
        optimizer.step()
    return (factors[0] @ factors[1]).detach()


PROPERTIES: dict[str, Property] = {
    "HEAL-PARAMS": heal_params,
    "HEAL-PREFIX": heal_prefix,
    "HEAL-RANK": heal_rank,
}
