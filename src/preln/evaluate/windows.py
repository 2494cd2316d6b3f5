"""Loss with a window that strides over a text, and loss by how much text came before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError
from preln.base.stats import bootstrap_interval, resample_indices
from preln.evaluate.perplexity import LossResult, check_tokens, exp_or_inf
from preln.models import token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def strided_perplexity(
    model: PreTrainedModel,
    text: Int[Tensor, " t"] | str,
    *,
    length: int,
    stride: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> LossResult:
    """Perplexity of one long text, every token predicted once with at least ``length - stride`` before it.

    Windows of ``length`` tokens begin every ``stride`` tokens; each predicts only the tokens that no window
    before it did (the usual evaluation with a fixed window, as in transformers' documentation on perplexity).
    The first window predicts all of its tokens but the first. ``stride = length`` gives disjoint windows,
    whose first tokens have nothing before them and are not predicted. The interval resamples windows, with
    their numbers of predicted tokens as weights: a bootstrap over disjoint blocks of the text (Carlstein
    1986), fair where what one block says of the loss does not reach far into the next.

    Args:
        model: A causal model of transformers.
        text: Token ids ``[T]``, or a string.
        length: Tokens in a window, at least 2.
        stride: Tokens from one window's start to the next, 1 to ``length``.
        tokenizer: Needed for a string; adds no special tokens.
        batch_size: Windows in one forward pass.
        seed: Fixes the bootstrap's resamples.

    Returns:
        The loss; ``sequences`` has one row a window: ``sequence``, ``start``, ``loss``, ``tokens``, and
        ``context``, the least number of tokens before a predicted one.

    Raises:
        InputError: Bad ids, fewer than two tokens, or a length and stride that do not fit.
    """
    ids = _ids(text, tokenizer)
    if length < 2 or not 1 <= stride <= length:
        raise InputError(f"length {length}, stride {stride}: use a length of 2 or more, a stride of 1 to it")
    if ids.numel() < 2:
        raise InputError(f"a text of {ids.numel()} tokens: nothing to predict: give at least two tokens")
    check_tokens(model, ids[None], None)
    starts = _starts(ids.numel(), length, stride)
    full = [s for s in starts if s + length <= ids.numel()]
    parts = []
    if full:
        windows = torch.stack([ids[s : s + length] for s in full])
        parts += list(token_losses(model, windows, batch_size=batch_size)[0])
    if len(full) < len(starts):  # the last window may be shorter, and goes alone
        parts += list(token_losses(model, ids[None, starts[-1] :])[0])
    rows, done = [], 0
    for number, (start, losses) in enumerate(zip(starts, parts, strict=True)):
        end = start + len(losses) + 1
        fresh = losses[max(done - start, 1) - 1 :].double()  # losses[i] is that of the window's token i + 1
        if not bool(torch.isfinite(fresh).all()):
            raise InputError(
                f"the loss of the window at token {start} is not finite: check weights and dtype"
            )
        rows.append((number, start, float(fresh.mean()), len(fresh), max(done - start, 1)))
        done = end
    frame: Any = pd.DataFrame(rows, columns=["sequence", "start", "loss", "tokens", "context"])
    total = int(frame["tokens"].sum())
    loss = float((frame["loss"] * frame["tokens"]).sum()) / total
    low, high = bootstrap_interval(frame["loss"], weights=frame["tokens"], seed=seed)
    return LossResult(loss, low, high, exp_or_inf(loss), total, frame)


def loss_by_position(
    model: PreTrainedModel,
    tokens: Int[Tensor, "n t"],
    attention_mask: Int[Tensor, "n t"] | None = None,
    *,
    buckets: bool = False,
    batch_size: int = 4,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean loss of the tokens at each position, or at positions 1, 2 to 3, 4 to 7, and so on.

    A token's position is the number of real tokens before it in its sequence, so padding shifts nothing.
    Intervals resample sequences (95 %, percentile bootstrap), the same resamples for all positions.

    Args:
        model: A causal model of transformers.
        tokens: Ids ``[n, T]``.
        attention_mask: ``[n, T]``, 1 where a token is real.
        buckets: Whether to pool positions from one power of two to the next.
        batch_size: Sequences in one forward pass.
        draws: Resamples.
        seed: Fixes them.

    Returns:
        ``first``, ``last`` (positions, inclusive), ``n`` (tokens), ``sequences`` that have such tokens,
        ``loss`` (nats), ``low``, ``high`` (NaN with a single sequence).

    Raises:
        InputError: The shapes do not fit, no token is predicted, or an id is outside the vocabulary.
    """
    check_tokens(model, tokens, attention_mask)
    losses, mask = token_losses(model, tokens, attention_mask, batch_size=batch_size)
    if not bool(mask.any()):
        raise InputError(
            "the attention mask leaves no token to predict: give sequences of two tokens or more"
        )
    real = torch.ones_like(tokens) if attention_mask is None else attention_mask.long()
    places = (real.cumsum(dim=1) - 1)[:, 1:].cpu().numpy()
    counted = mask.numpy()
    if not np.isfinite(losses.numpy()[counted]).all():
        raise InputError("a loss is not finite: check the model's weights and its dtype")
    edges = _edges(int(places[counted].max()), buckets)
    column = np.searchsorted(edges[:, 0], places, side="right") - 1
    sums, counts = np.zeros((len(tokens), len(edges))), np.zeros((len(tokens), len(edges)))
    rows, positions = np.nonzero(counted)
    chosen = column[rows, positions]
    np.add.at(sums, (rows, chosen), losses.double().numpy()[rows, positions])
    np.add.at(counts, (rows, chosen), 1.0)
    low, high = _intervals(sums, counts, draws, seed)
    held = counts.sum(axis=0) > 0
    frame: Any = pd.DataFrame(
        {
            "first": edges[:, 0],
            "last": edges[:, 1],
            "n": counts.sum(axis=0).astype(np.int64),
            "sequences": (counts > 0).sum(axis=0),
            "loss": sums.sum(axis=0) / np.maximum(counts.sum(axis=0), 1.0),
            "low": low,
            "high": high,
        }
    )
    return frame[held].reset_index(drop=True)


def _ids(text: Tensor | str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """One row of token ids."""
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("a text needs the model's tokenizer: give tokenizer=, or token ids")
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    if text.ndim != 1:
        raise InputError(f"tokens must be one row [T], not {list(text.shape)}: for [n, T] use perplexity")
    return text


def _starts(tokens: int, length: int, stride: int) -> list[int]:
    """Where windows begin: every stride, until one reaches the end with something left to predict."""
    starts = [0]
    while starts[-1] + length < tokens:
        starts.append(starts[-1] + stride)
    # a last window of one token with nothing before it has nothing to predict
    return starts if tokens - starts[-1] > 1 else starts[:-1]


def _edges(largest: int, buckets: bool) -> np.ndarray:
    """First and last position of every row, ``[rows, 2]``."""
    if not buckets:
        return np.repeat(np.arange(1, largest + 1)[:, None], 2, axis=1)
    firsts = 2 ** np.arange(int(math.log2(largest)) + 1)
    return np.stack([firsts, np.minimum(2 * firsts - 1, largest)], axis=1)


def _intervals(sums: np.ndarray, counts: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of ``sum / count`` in every column, rows resampled together."""
    rows, columns = sums.shape
    if rows < 2:
        return np.full(columns, math.nan), np.full(columns, math.nan)
    picks = resample_indices(rows, draws=draws, seed=seed)
    times = np.stack([np.bincount(pick, minlength=rows) for pick in picks]).astype(np.float64)
    drawn = times @ counts
    means = np.divide(times @ sums, drawn, out=np.full(drawn.shape, math.nan), where=drawn > 0)
    ends = np.full((2, columns), math.nan)
    several = (counts > 0).sum(axis=0) > 1  # one sequence shows no spread
    ends[:, several] = np.nanquantile(means[:, several], [0.025, 0.975], axis=0)
    return ends[0], ends[1]
