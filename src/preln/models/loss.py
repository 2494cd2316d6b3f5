"""Next-token losses, token by token, for any causal model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.base.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_length(model: nn.Module, length: int) -> None:
    """Refuse sequences of more tokens than the model has positions for.

    Raises:
        InputError: Naming both numbers; beyond them learned positions have no value, and others were never
            trained.
    """
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise InputError(
            f"length {length}: the model takes sequences of at most {most} tokens: give shorter ones"
        )


def target_mask(
    input_ids: Int[Tensor, "n t"], attention_mask: Int[Tensor, "n t"] | None
) -> Bool[Tensor, "n t-1"]:
    """Which next-token targets count: both the token and its predecessor are real, not padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    real = attention_mask.bool()
    return real[:, 1:] & real[:, :-1]


def losses_from_logits(
    logits: Float[Tensor, "n t v"], input_ids: Int[Tensor, "n t"]
) -> Float[Tensor, "n t-1"]:
    """Cross entropy (nats) of each next token, ``-log softmax(logits[:, i])[ids[:, i + 1]]``, in float32."""
    predictions = logits[:, :-1].float().flatten(0, 1)
    losses = F.cross_entropy(predictions, input_ids[:, 1:].flatten().to(logits.device), reduction="none")
    return losses.view(input_ids.shape[0], -1)


@torch.no_grad()
def token_losses(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "n t"],
    attention_mask: Int[Tensor, "n t"] | None = None,
    *,
    batch_size: int = 4,
) -> tuple[Float[Tensor, "n t-1"], Bool[Tensor, "n t-1"]]:
    """Next-token cross entropies in nats (float32, on the CPU) and the mask of those that count.

    The loss of a model is ``losses[mask].mean()``: weighted by tokens, never by sequences. Sequences go
    through ``batch_size`` at a time, so at most that many rows of logits exist at once.

    Raises:
        InputError: The sequences are longer than the model takes.
    """
    check_length(model, input_ids.shape[1])
    device = next(model.get_input_embeddings().parameters()).device
    was_training = model.training
    model.eval()
    parts = []
    try:
        starts = range(0, input_ids.shape[0], batch_size)
        for start in track(starts, label="loss", total=len(starts)):
            ids = input_ids[start : start + batch_size].to(device)
            mask = None
            if attention_mask is not None:
                mask = attention_mask[start : start + batch_size].to(device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            parts.append(losses_from_logits(logits, ids).cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts), target_mask(input_ids, attention_mask).cpu()
