"""What a pruned model writes, beside what the unpruned model wrote after the same prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from preln.base.errors import InputError, require
from preln.base.progress import track
from preln.base.stats import bootstrap_interval, resample_indices
from preln.evaluate.decoding import Decoding, check_room, device_of, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompts = Sequence[str] | Int[Tensor, "n t"]
Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Continuations:
    """What one model wrote.

    Attributes:
        ids: For each prompt the new tokens, without the end-of-text token.
        texts: The same as text.
        hit_limit: For each prompt, whether the limit came before the end of the text.
        prompts: The prompts' token ids.
        limit: Tokens that were allowed.
    """

    ids: list[list[int]]
    texts: list[str]
    hit_limit: list[bool]
    prompts: list[list[int]]
    limit: int


def write_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    new_tokens: int = 64,
    batch_size: int = 8,
) -> Continuations:
    """Continue prompts greedily: always the likeliest token, until the end of the text or the limit.

    No setting of the model's own generation configuration plays a part, other than its end-of-text tokens.
    Prompts of a batch are padded on the left and masked, so that each is continued as it would be alone, up
    to rounding.

    Args:
        model: A causal model of transformers.
        tokenizer: Its tokenizer.
        prompts: Texts, or ids ``[n, T]``.
        new_tokens: The limit.
        batch_size: Prompts side by side.

    Raises:
        InputError: No prompt, an empty one, one too long, or a count below 1.
    """
    for name, value in (("new_tokens", new_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    encoded = _encode(tokenizer, prompts)
    check_room(model, max(map(len, encoded)) + new_tokens)
    ends, ids, limits = end_tokens(model, tokenizer), [], []
    starts = range(0, len(encoded), batch_size)
    with evaluating(model):
        for start in track(starts, label="write", total=len(starts)):
            for row in _greedy(model, encoded[start : start + batch_size], ends, new_tokens):
                stop = next((place for place, token in enumerate(row) if token in ends), None)
                ids.append(row[:stop])
                limits.append(stop is None)
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
    return Continuations(ids, texts, limits, encoded, new_tokens)


def compare_generation(
    model: PreTrainedModel | Continuations,
    reference: PreTrainedModel | Continuations,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    new_tokens: int = 64,
    batch_size: int = 8,
    embed: Embed | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare greedy continuations with the reference model's own.

    Args:
        model: The pruned model, or what it wrote.
        reference: The unpruned model, or what it wrote after these prompts (so that one run serves many).
        tokenizer: The tokenizer of both.
        prompts: Texts, or ids ``[n, T]``.
        new_tokens: Limit of each continuation.
        batch_size: Prompts side by side.
        embed: From texts to vectors ``[n, d]``; by default the packaged sentence model.
        draws: Bootstrap resamples of prompts.
        seed: Fixes them.

    Returns:
        A table, one row a prompt: ``prompt`` (its number), ``same`` (identical tokens), ``agreed`` (leading
        tokens in common), ``bleu`` (0 to 100, over the orders that the text is long enough
        for; NaN where the reference wrote nothing), ``similarity`` (cosine
        of the sentence embeddings), and for both models, the reference's with the suffix ``_reference``:
        ``tokens``, ``hit_limit``, ``repeated_4`` (share of 4-grams that came before in the same text),
        ``distinct_1``, ``distinct_2`` (distinct n-grams over all n-grams), ``text``.
        A summary: ``measure``, ``value``, ``low``, ``high`` (95 %, prompts resampled), ``n`` (prompts that
        the measure exists for); means of the table, and ``corpus_bleu`` (sacrebleu's defaults).

    Raises:
        InputError: Bad prompts or counts, other prompts behind a reference, or a missing package.
    """
    require("sacrebleu", extra="eval")
    told: dict[str, Any] = {"new_tokens": new_tokens, "batch_size": batch_size}
    wrote, wanted = (
        each if isinstance(each, Continuations) else write_on(each, tokenizer, prompts, **told)
        for each in (model, reference)
    )
    expected = _encode(tokenizer, prompts)
    if any(each.prompts != expected or each.limit != new_tokens for each in (wrote, wanted)):
        raise InputError("the continuations are of other prompts or of another limit: write them anew")
    if embed is None:
        from preln.evaluate.sentences import load_sentence_encoder

        embed = load_sentence_encoder().embed
    from preln.evaluate.sentences import cosine_similarities

    scores = [_sentence_bleu(ours, theirs) for ours, theirs in zip(wrote.texts, wanted.texts, strict=True)]
    table = pd.DataFrame({"prompt": range(len(expected))})
    pairs = list(zip(wrote.ids, wanted.ids, strict=True))
    table["same"] = [ours == theirs for ours, theirs in pairs]
    table["agreed"] = [_agreed(ours, theirs) for ours, theirs in pairs]
    table["bleu"] = [
        score.score if text else math.nan for score, text in zip(scores, wanted.texts, strict=True)
    ]
    table["similarity"] = cosine_similarities(embed(wrote.texts), embed(wanted.texts)).tolist()
    for suffix, each in (("", wrote), ("_reference", wanted)):
        table[f"tokens{suffix}"] = [len(ids) for ids in each.ids]
        table[f"hit_limit{suffix}"] = each.hit_limit
        table[f"repeated_4{suffix}"] = [1.0 - distinct_share(ids, 4) for ids in each.ids]
        for n in (1, 2):
            table[f"distinct_{n}{suffix}"] = [distinct_share(ids, n) for ids in each.ids]
        table[f"text{suffix}"] = each.texts
    return table, _summary(table, scores, draws, seed)


def distinct_share(ids: Sequence[int], n: int) -> float:
    """Distinct n-grams over all n-grams of a text (distinct-n, Li et al. 2016); NaN where it has none.

    ``1 - distinct_share(ids, 4)`` is the share of repeated 4-grams (seq-rep-4, Welleck et al. 2020).

    >>> distinct_share([1, 2, 1, 2, 1], 2)
    0.5
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: the model's generation settings say so, or else the tokenizer."""
    found: Any = getattr(model.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        return set()
    return {int(token) for token in (found if isinstance(found, list | tuple) else [found])}


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> list[list[int]]:
    """Prompts as lists of ids."""
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.numel() == 0:
            raise InputError(f"prompts must be texts or ids [n, T], not {list(prompts.shape)}")
        return prompts.tolist()
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError("no prompt to continue: give at least one")
    encoded = [list(tokenizer(text)["input_ids"]) for text in texts]
    if empty := [number for number, ids in enumerate(encoded) if not ids]:
        raise InputError(f"prompt {empty[0]} is empty: give it at least one token")
    return encoded


def _greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], ends: set[int], limit: int
) -> list[list[int]]:
    """At most ``limit`` likeliest tokens a prompt; what follows an end-of-text token has no meaning."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    device = device_of(model)
    decoding = Decoding(model)
    logits = decoding.prefill(ids.to(device), mask.to(device))
    stops = torch.tensor(sorted(ends), dtype=torch.long)
    ended, written = torch.zeros(len(prompts), dtype=torch.bool), []
    while True:
        chosen = logits.argmax(-1)
        written.append(chosen.cpu())
        ended |= torch.isin(written[-1], stops)
        if bool(ended.all()) or len(written) == limit:
            return torch.stack(written, dim=1).tolist()
        logits = decoding.step(chosen.to(device))


def _agreed(first: Sequence[int], second: Sequence[int]) -> int:
    """Leading tokens that two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _sentence_bleu(text: str, reference: str) -> Any:
    """BLEU of one text by sacrebleu, over the orders that it is long enough for (effective order)."""
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True).sentence_score(text, [reference])


def _corpus_bleu(counts: np.ndarray) -> float:
    """BLEU of a whole corpus from its sentences' counts, with sacrebleu's default smoothing.

    Args:
        counts: ``[sentences, 10]``: n-grams hit, n-grams written (n from 1 to 4 each), and the two lengths.
    """
    from sacrebleu.metrics.bleu import BLEU

    *grams, written, wanted = (int(count) for count in counts.sum(axis=0))
    return float(BLEU.compute_bleu(grams[:4], grams[4:], written, wanted, smooth_method="exp").score)


def _summary(table: pd.DataFrame, scores: Sequence[Any], draws: int, seed: int) -> pd.DataFrame:
    """Means over prompts, and the corpus BLEU, each with its interval."""
    counts = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores])
    low, high, n = math.nan, math.nan, len(scores)
    if n > 1:
        drawn = [_corpus_bleu(counts[pick]) for pick in resample_indices(n, draws=draws, seed=seed)]
        low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    rows: list[dict[str, Any]] = [
        {"measure": "corpus_bleu", "value": _corpus_bleu(counts), "low": low, "high": high, "n": n}
    ]
    for name in table.columns:
        if name == "prompt" or name.startswith("text"):
            continue
        values = table[name].to_numpy(np.float64)
        values = values[~np.isnan(values)]
        low, high = bootstrap_interval(values, draws=draws, seed=seed)
        value = float(values.mean()) if len(values) else math.nan
        rows.append({"measure": name, "value": value, "low": low, "high": high, "n": len(values)})
    return pd.DataFrame(rows)
