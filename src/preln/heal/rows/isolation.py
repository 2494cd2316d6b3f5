"""Forward passes on packed windows, in which no document sees another.

How a model is told where documents end differs by architecture, so it is tried out once a model, on random
tokens, before anything is trained on it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.heal.rows.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def positions_of(documents: Tensor) -> Tensor:
    """``[n, T]`` positions that count from 0 in every document, and in the padding.

    >>> positions_of(torch.tensor([[0, 0, 1, 1, 1, -1]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def mask_of(documents: Tensor) -> Tensor:
    """``[n, 1, T, T]``, whether a token sees another: one of its own document, and not behind it.

    Padding sees padding, so that no row of a softmax is empty.
    """
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


def _additive(documents: Tensor, dtype: torch.dtype) -> Tensor:
    least = torch.finfo(dtype).min
    return torch.zeros((), dtype=dtype, device=documents.device).where(mask_of(documents), least)


# How a model may be told, the first that works: transformers makes masks (also of sliding windows) from
# positions that restart; some models read a mask that is given, as truth values or added to the scores, with
# or without positions.
_Form = Callable[[Tensor, torch.dtype], dict[str, Tensor]]
_FORMS: dict[str, _Form] = {
    "positions": lambda d, _: {"position_ids": positions_of(d)},
    "mask and positions": lambda d, _: {"attention_mask": mask_of(d), "position_ids": positions_of(d)},
    "added mask and positions": lambda d, t: {
        "attention_mask": _additive(d, t),
        "position_ids": positions_of(d),
    },
    "mask": lambda d, _: {"attention_mask": mask_of(d)},
    "added mask": lambda d, t: {"attention_mask": _additive(d, t)},
}
# Rounding of another shape of the same product may be this many times what first documents show, and, where
# the machine rounds theirs all alike and they show none, this many times that of one number. What another
# first document moves is compared at one shape, where the rounding of the dtype is no excuse.
ROUNDING = 8.0
LEAST = 3e-4  # half the digits of float32, and no less
# Lengths of the documents in the windows of the trial; the second window has padding.
_TRIAL = ((9, 14, 7), (12, 15))


@dataclass(frozen=True)
class _Answer:
    """What a trial found: the form that keeps documents apart, or the reason why none does."""

    attention: str | None
    form: str | None
    reason: str | None


_answers: weakref.WeakKeyDictionary[nn.Module, _Answer] = weakref.WeakKeyDictionary()


def forward_inputs(model: PreTrainedModel, examples: Examples) -> dict[str, Any]:
    """Keyword arguments of a forward pass on these windows, without a cache.

    Windows of one row: ``input_ids`` and, where there is padding, ``attention_mask``. Packed windows: in the
    form that keeps the documents of this model apart, which is found out at the first call
    (:func:`isolates`).

    Args:
        model: A causal language model, or peft's wrapper of one.
        examples: Windows on the model's device.

    Raises:
        InputError: Packed windows, and a model that mixes documents in every form.
    """
    inputs: dict[str, Any] = {"input_ids": examples.input_ids, "use_cache": False}
    if examples.documents is None:
        if examples.attention_mask is not None:
            inputs["attention_mask"] = examples.attention_mask
        return inputs
    answer = _answer(model)
    width = examples.input_ids.shape[1]
    reason = answer.reason or _window_reason(model, answer.form or "", width)
    if reason is not None:
        raise InputError(f"{reason}: ask for padding instead of packing")
    return inputs | _FORMS[answer.form or ""](examples.documents, _dtype(model))


def isolates(model: PreTrainedModel) -> str | None:
    """None where packed documents cannot touch one another in this model, or else the reason.

    On random tokens, in evaluation mode, packed windows must pass two tests: the logits of every document are
    those of the document by itself, and those of later documents stay when the first one changes. The
    tolerances are ``ROUNDING`` times what the same two comparisons show at first documents of a plain pass,
    which nothing behind them can reach; the first is no less than so many times the rounding of the model's
    dtype. A plain pass itself must fail. Asked once a model and attention implementation.
    """
    return _answer(model).reason


def _answer(model: Any) -> _Answer:
    attention = getattr(_inner(model).config, "_attn_implementation", None)
    known = _answers.get(model)
    if known is None or known.attention != attention:
        with _evaluating(model), torch.no_grad():
            form, reason = _tried(model)
        known = _answers[model] = _Answer(attention, form, reason)
    return known


def _tried(model: Any) -> tuple[str | None, str | None]:
    """The first form that keeps documents apart, or the reason why none does."""
    ids, first_changed, rest_changed, documents = (
        tensor.to(next(model.parameters()).device) for tensor in _trial(model)
    )
    runs = [(w, documents[w] == d, d > 0) for w, sizes in enumerate(_TRIAL) for d in range(len(sizes))]
    alone = [_logits(model, ids[w][run][None])[0] for w, run, _ in runs]

    def off(found: Tensor, *, later: bool) -> float:
        cases = zip(runs, alone, strict=True)
        return max(_gap(found[w][run], x) for (w, run, after), x in cases if after == later)

    def moved(found: Tensor, former: Tensor, *, later: bool) -> float:
        return max(_gap(found[w][run], former[w][run]) for w, run, after in runs if after == later)

    plain = _logits(model, ids)
    most_off = max(LEAST, ROUNDING * max(torch.finfo(_dtype(model)).eps, off(plain, later=False)))
    most_moved = max(LEAST, ROUNDING * moved(_logits(model, rest_changed), plain, later=False))
    mixing = off(plain, later=True), moved(_logits(model, first_changed), plain, later=True)
    if not (most_off < mixing[0] and most_moved < mixing[1]):
        return None, f"{_name(model)}: rounding hides whether packed rows mix (tolerance {most_off:.1g})"
    failures = []
    for form, made in _FORMS.items():
        try:
            kwargs = made(documents, _dtype(model))
            packed, changed = (_logits(model, tokens, **kwargs) for tokens in (ids, first_changed))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that does not take such a mask
            failures.append(f"{form}: {type(error).__name__}")
            continue
        gaps = max(off(packed, later=late) for late in (False, True)), moved(changed, packed, later=True)
        if gaps[0] <= most_off and gaps[1] <= most_moved:
            return form, None
        failures.append(f"{form}: off by {max(gaps):.1g}")
    return None, f"{_name(model)}: packed rows mix in every form of a pass ({', '.join(failures)})"


def _trial(model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random tokens, the same with other first documents, the same with other later ones, the documents."""
    documents = torch.full((len(_TRIAL), max(map(sum, _TRIAL))), -1)
    for window, sizes in enumerate(_TRIAL):
        documents[window, : sum(sizes)] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    vocabulary = _inner(model).get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, documents.shape, generator=torch.Generator().manual_seed(0))
    others = (ids + vocabulary // 2) % vocabulary
    first, rest = documents == 0, documents > 0
    return ids, torch.where(first, others, ids), torch.where(rest, others, ids), documents


def _logits(model: Any, ids: Tensor, **kwargs: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False, **kwargs).logits.float()


def _gap(found: Tensor, wanted: Tensor) -> float:
    """How far logits ``[t, v]`` are apart, over how much they vary from token to token.

    The larger of the difference at the first token, which a state or a convolution that runs on reaches
    first, and the median, which attention moves. The largest says nothing: in a real model single random
    tokens turn rounding into other predictions.
    """
    size = (wanted - wanted.mean(0)).norm(dim=1).mean()
    differences = (found - wanted).norm(dim=1) / size
    gap = float(torch.maximum(differences[0], differences.median()))
    return gap if math.isfinite(gap) else math.inf


def _window_reason(model: Any, form: str, width: int) -> str | None:
    """Why windows of this width lose what the model restricts by distance, though short ones do not.

    A mask that is given replaces the one of a sliding window, and chunks of attention are counted from the
    start of the window, not of the document; the trial's windows are too short to show either.
    """
    config = _inner(model).config.get_text_config()
    sliding, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    name = _name(model)
    if isinstance(chunk, int) and width > chunk:
        return f"{name}: packed windows of {width} tokens are longer than its attention's chunks of {chunk}"
    if isinstance(sliding, int) and width > sliding and form != "positions":
        return f"{name}: packed windows of {width} tokens are longer than its sliding window of {sliding}"
    return None


def _inner(model: Any) -> Any:
    """The model inside the wrapper that several processes put around it."""
    return model.module if isinstance(getattr(model, "module", None), nn.Module) else model


def _name(model: Any) -> str:
    """The class inside all wrappers, peft's too."""
    inner = _inner(model)
    return type(getattr(inner, "get_base_model", lambda: inner)()).__name__


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
