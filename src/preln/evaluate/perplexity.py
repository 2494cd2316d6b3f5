"""Loss and perplexity over tokens, with an interval over sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.base.stats import bootstrap_interval
from preln.models import token_losses
from preln.models.finite import first_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LossResult:
    """A model's loss on some tokens.

    Attributes:
        loss: Mean cross entropy of the next token in nats, every predicted token weighing the same.
        low: Lower end of the 95 % bootstrap interval over sequences; NaN with a single sequence.
        high: Its upper end.
        perplexity: ``exp(loss)``; infinite where that leaves the range of a float.
        tokens: Number of predicted tokens.
        sequences: One row a sequence: ``sequence``, ``loss`` (its own mean), ``tokens``.
    """

    loss: float
    low: float
    high: float
    perplexity: float
    tokens: int
    sequences: pd.DataFrame

    def as_dict(self) -> dict[str, Any]:
        """The numbers without the table, JSON-ready: what is not finite becomes None."""
        numbers = {"loss": self.loss, "low": self.low, "high": self.high, "perplexity": self.perplexity}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {**finite, "tokens": self.tokens, "n": len(self.sequences)}


def perplexity(
    model: PreTrainedModel,
    tokens: Int[Tensor, "n t"],
    attention_mask: Int[Tensor, "n t"] | None = None,
    *,
    batch_size: int = 4,
    seed: int = 0,
) -> LossResult:
    """Token-weighted loss and perplexity.

    ``loss = sum over real targets of -log p(x[i+1] | x[..i]) / number of real targets``; perplexity is its
    exponential. Padding is neither predicted nor predicted from. The interval resamples sequences, with their
    numbers of tokens as weights (percentile bootstrap, Efron 1979).

    Args:
        model: A causal language model of transformers.
        tokens: Ids ``[n, T]``, T at least 2.
        attention_mask: ``[n, T]``, 1 where a token is real, or None where all are.
        batch_size: Sequences in one forward pass.
        seed: Fixes the bootstrap's resamples.

    Raises:
        InputError: The shapes do not fit, no token is predicted, an id is outside the vocabulary, or a loss
            is not finite: the line names the block and the module that it comes from.
    """
    check_tokens(model, tokens, attention_mask)
    losses, mask = token_losses(model, tokens, attention_mask, batch_size=batch_size)
    counts = mask.sum(dim=1)
    # where() rather than a product: what padding holds may be NaN, and NaN times zero is NaN
    sums = torch.where(mask, losses, torch.zeros_like(losses)).double().sum(dim=1)
    total = int(counts.sum())
    if total == 0:
        raise InputError(
            "the attention mask leaves no token to predict: give sequences of two tokens or more"
        )
    if not bool(torch.isfinite(sums).all()):
        first = int((~torch.isfinite(sums)).nonzero()[0])
        own = {"input_ids": tokens[first : first + 1].to(model.device)}
        if attention_mask is not None:
            own["attention_mask"] = attention_mask[first : first + 1].to(model.device)
        where = first_not_finite(model, own)
        raise InputError(
            f"{where or 'head'}: the loss of sequence {first} is not finite: check the weights, or use a "
            "wider --dtype"
        )
    real = counts > 0
    means = torch.where(real, sums / counts.clamp(min=1), torch.full_like(sums, math.nan))
    low, high = bootstrap_interval(means[real].numpy(), weights=counts[real].numpy(), seed=seed)
    loss = float(sums.sum()) / total
    frame = pd.DataFrame({"sequence": range(len(counts)), "loss": means.numpy(), "tokens": counts.numpy()})
    return LossResult(loss, low, high, exp_or_inf(loss), total, frame)


def exp_or_inf(loss: float) -> float:
    """``exp`` that ends at infinity, as a badly broken model's perplexity does."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_tokens(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor | None) -> None:
    """Refuse what would fail deep inside the model."""
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise InputError(f"tokens must be [n, T] with T at least 2, not {list(tokens.shape)}")
    if tokens.is_floating_point():
        raise InputError(f"tokens must be integer ids, not {tokens.dtype}")
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask is {list(attention_mask.shape)} and tokens are {list(tokens.shape)}: "
            "give equal shapes"
        )
    embedding: Any = model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InputError(
            f"token ids run from {int(tokens.min())} to {int(tokens.max())}, the model has {vocabulary}: "
            "use the model's own tokenizer"
        )
