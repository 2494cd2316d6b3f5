"""GRASP: redundant blocks keep only those singular directions that the loss feels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import find_blocks
from preln.models.residual import as_tokens, forward_losses, undisturbed, wide
from preln.prune.plan import Plan, make_plan
from preln.prune.replace.registry import method_plan, replacement
from preln.prune.scores import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@replacement("grasp")
def grasp(
    model: PreTrainedModel,
    tokens: Tensor,
    drop: int,
    *,
    seed: int = 0,
    protect: str = "none",
    ratio: float = 0.1,
) -> tuple[PreTrainedModel, Plan]:
    """Replace the linear maps of redundant blocks by few singular directions (Liu et al. 2025, GRASP).

    The ``drop`` blocks of lowest block influence are redundant. Each of their linear maps, U diag(s) V^T,
    keeps the directions with the largest ``|s_k dL/ds_k|``, ``dL/ds_k = u_k^T (dL/dW) v_k`` and L the mean
    next-token loss, ``max(1, round(ratio * rank))`` of them. The product is stored dense: shapes, memory and
    time stay, and only the rank falls. All gradients are those of the dense model, from one backward pass;
    published code shifts the labels twice, so that it learns to predict the token after the next.

    Args:
        model: A causal model.
        tokens: Calibration tokens ``[n, T]``.
        drop: How many blocks are replaced; none goes.
        seed: Nothing is drawn; recorded only.
        protect: Preset of blocks that are not replaced.
        ratio: Share of the singular directions that are kept.

    Raises:
        InputError: A ratio outside (0, 1], or no gradient.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"grasp: ratio {ratio}: keep a share above 0 and at most 1")
    scores = score(model, tokens, ["block_influence"])
    chosen = make_plan(scores, "block_influence", drop=drop, protect=protect).drop
    gradients = weight_gradients(model, tokens, chosen)
    new = copy.deepcopy(model)
    blocks = find_blocks(new)[1]
    with torch.no_grad():
        for index in chosen:
            for name, weight in linear_maps(blocks[index]).items():
                weight.copy_(truncated(weight, gradients[index][name], ratio))
    count = len(blocks)
    return new, method_plan("grasp", count, drop, seed, protect, replaced=chosen, ratio=ratio)


def linear_maps(block: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the block that are matrices, or stacks of them (fused experts), by name."""
    found: dict[str, nn.Parameter] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim in (2, 3) and not name.endswith("bias"):
                found[f"{path}.{name}" if path else name] = parameter
    return found


def weight_gradients(
    model: PreTrainedModel, batch: Tensor, chosen: Sequence[int], batch_size: int = 4
) -> dict[int, dict[str, Tensor]]:
    """Gradients of the mean next-token loss (nats) at the linear maps of some blocks.

    Raises:
        InputError: A weight that the loss does not reach.
    """
    tokens, blocks = as_tokens(batch), find_blocks(model)[1]
    maps = {index: linear_maps(blocks[index]) for index in chosen}
    device = next(model.get_input_embeddings().parameters()).device
    total = int(tokens.targets.sum())
    with undisturbed(model, [p for named in maps.values() for p in named.values()]):
        for part in tokens.batches(batch_size, device):
            (forward_losses(model, part).sum() / total).backward()
        found: dict[int, dict[str, Tensor]] = {}
        for index, named in maps.items():
            found[index] = {}
            for name, parameter in named.items():
                # an expert that no token was sent to has no gradient, and no direction of it matters
                gradient = parameter.grad
                found[index][name] = torch.zeros_like(parameter) if gradient is None else gradient.detach()
    return found


def importance(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Singular vectors and values of ``weight``, and ``|s_k u_k^T G v_k|``: U, s, V^T and importances."""
    u, s, vh = torch.linalg.svd(wide(weight.detach()), full_matrices=False)
    slope = torch.einsum("...ik,...ij,...kj->...k", u, wide(gradient), vh)
    return u, s, vh, (s * slope).abs()


def truncated(weight: Tensor, gradient: Tensor, ratio: float) -> Tensor:
    """``sum over the most important k of s_k u_k v_k^T``, in the dtype of ``weight``."""
    u, s, vh, value = importance(weight, gradient)
    rank = max(1, round(ratio * s.shape[-1]))
    kept = torch.zeros_like(s).scatter(-1, value.topk(rank, dim=-1).indices, 1.0)
    return ((u * (s * kept).unsqueeze(-2)) @ vh).to(weight.dtype)
