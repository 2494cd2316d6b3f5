"""The anatomy of a model: structure and norm placement from one short run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from preln.base.errors import InputError
from preln.models.placement import inspect_block
from preln.models.structure import Anatomy, Tracer, find_blocks, is_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRE_LN = ("pre-ln", "parallel")


@torch.no_grad()
def anatomy(model: PreTrainedModel) -> Anatomy:
    """Find blocks, branches, norms and head of a causal model, and measure where its norms sit.

    Runs eight fixed token ids through the model and every block twice more. The model is left as it was.

    Raises:
        InputError: The blocks or the head cannot be found.
    """
    path, blocks = find_blocks(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        raise InputError(f"{type(model).__name__}: no language-model head found: this is no causal model")
    width = model.config.get_text_config().hidden_size
    inside = {id(m) for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if id(m) not in inside and is_norm(m, width)]
    table = next(embedding.parameters())
    ids = torch.arange(3, 11, device=table.device).remainder(table.shape[0])[None]
    was_training = model.training
    model.eval()
    try:
        with Tracer([*blocks, *outside, head]) as trace:
            model(input_ids=ids, use_cache=False)
        after = trace.order[trace.order.index(blocks[-1]) + 1 :]
        final = next((m for m in after if any(m is norm for norm in outside)), None)
        found = Anatomy(path=path, blocks=blocks, final_norm=final, head=head, embedding=embedding)
        placements = []
        for index, block in enumerate(blocks):
            parts, placement, evidence = inspect_block(block, trace.calls[block], width)
            found.block_parts.append(parts)
            placements.append(placement)
            found.evidence[f"block_{index}"] = evidence
    finally:
        model.train(was_training)
    found.placement = placements[0] if len(set(placements)) == 1 else "unknown"
    if found.placement == "unknown":
        found.evidence["placements"] = placements
    return found


def require_pre_ln(found: Anatomy, what: str) -> None:
    """Refuse a model whose blocks are not Pre-LN for a measure or claim that only holds there.

    Raises:
        InputError: Naming the measured placement.
    """
    if found.placement not in PRE_LN:
        raise InputError(
            f"{what}: needs a Pre-LN model, and this one measures as {found.placement}: "
            "ask for measures without Pre-LN assumptions"
        )
