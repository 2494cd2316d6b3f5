"""Carrying a plan out: a new plain model, and a checkpoint that is on disk only once it has been proved."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.base.faults import is_out_of_memory
from preln.base.files import staged_directory, write_text
from preln.models import drop_blocks, find_blocks
from preln.models.compact import compact_halves, is_compact, load_compact
from preln.models.halves import silence_halves
from preln.models.own_code import runs_own_code
from preln.prune.card import model_card
from preln.prune.plan import REMOVE, Plan, plan_layers, write_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NEW_TOKENS = 8


def prune(
    model: PreTrainedModel,
    drop: Iterable[int | str] | None = None,
    *,
    plan: Plan | None = None,
    compact: bool = False,
) -> PreTrainedModel:
    """A new Hugging Face model without some blocks or halves of blocks; the given one is untouched.

    Whole blocks leave a plain model. A half (``"5a"``: the attention of block 5, ``"6m"``: its MLP) leaves a
    plain model too, whose shapes stay: the last linear map of the branch, weight and bias, is exactly zero,
    which saves neither memory nor time. With ``compact`` the branch is really gone, and only
    :func:`preln.load_model` loads what is saved.

    Args:
        model: A causal model.
        drop: Blocks and halves to remove, counted from 0; or
        plan: a plan made for a model with as many blocks.
        compact: Take halves out instead of setting them to zero.

    Raises:
        InputError: Neither or both given, blocks that make no sense, a plan for another depth or of a
            replacement, a half that cannot be removed (see :func:`preln.models.halves.silence_halves`), or
            ``compact`` without a half to remove.
    """
    if (drop is None) == (plan is None):
        raise InputError("prune: give either the blocks to drop or a plan")
    count = len(find_blocks(model)[1])
    if plan is None:
        plan = plan_layers(drop or [], count)
    if plan.num_blocks != count:
        raise InputError(f"plan: made for {plan.num_blocks} blocks, but this model has {count}")
    if plan.method != REMOVE:
        raise InputError(f"plan: its method is {plan.method}, which reads tokens: use prune.replace_blocks")
    places = {old: new for new, old in enumerate(plan.keep)}
    halves = [(places[i], "attention") for i in plan.drop_attention]
    halves += [(places[i], "mlp") for i in plan.drop_mlp]
    if compact and not halves:
        raise InputError("the compact format is for halves, and none goes: leave --format out")
    with torch.no_grad():
        small = drop_blocks(model, plan.drop) if plan.drop else copy.deepcopy(model)
    if not halves:
        return small
    silenced = silence_halves(small, sorted(halves))
    return compact_halves(small, silenced) if compact else small


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    licence: str | None = None,
) -> Path:
    """Write a pruned model as a checkpoint with ``plan.yaml`` and a model card, after proving it.

    It is saved beside ``out``, loaded again by plain ``AutoModelForCausalLM`` (if compact, by preln, and
    plain transformers is seen to refuse it), its logits are compared with those of ``model``, and it
    generates with the cache on and off; only then it takes its place.

    Args:
        model: The pruned model, as :func:`prune` returns it.
        tokenizer: Saved along, if given.
        plan: What was done.
        out: Folder to make.
        licence: Licence of the source model, for the card.

    Raises:
        InputError: The model has not the depth that the plan leaves, ``out`` is taken, or the saved
            checkpoint does not reproduce the model: then nothing is left behind.
    """
    count = len(find_blocks(model)[1])
    if count != len(plan.keep):
        raise InputError(f"plan: leaves {len(plan.keep)} blocks, but the model to write has {count}")
    with staged_directory(out, checksums=True) as folder:
        _save(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_plan(plan, folder / "plan.yaml")
        write_text(folder / "README.md", model_card(model, plan, licence=licence))
        check_checkpoint(folder, model)
    return Path(out)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """``save_pretrained``, with whatever it raises as one line.

    Raises:
        InputError: transformers cannot save the model.
    """
    # how quantised weights were read cannot be undone, and need not be: they are written as they are
    settings: Any = {"save_original_format": False} if getattr(model, "is_quantized", False) else {}
    try:
        model.save_pretrained(folder, **settings)
    except Exception as error:  # quantised and converted models are refused in many ways
        if is_out_of_memory(error):
            raise
        raise InputError(f"checkpoint: transformers cannot save this model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@torch.no_grad()
def check_checkpoint(folder: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Prove that ``model`` comes back from ``folder``, and that it generates with a cache.

    Plain transformers loads it, or refuses it if the model is compact.

    Raises:
        InputError: It does not load, its logits differ, or cached generation departs from uncached.
    """
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"dtype": model.dtype, "local_files_only": True}
    attention = getattr(model.config, "_attn_implementation", None)
    if attention is not None:
        settings["attn_implementation"] = attention
    compact = is_compact(model)
    if (
        not compact
    ):  # own code was asked for when the model was loaded; none is run, or asked about, otherwise
        settings["trust_remote_code"] = runs_own_code(model)
    if compact:
        _check_refused(folder, model)
    load = load_compact if compact else AutoModelForCausalLM.from_pretrained
    try:
        # typed as the model alone, but with output_loading_info it is a pair
        pair: Any = load(folder, output_loading_info=True, **settings)
        loaded, report = pair
    except Exception as error:  # whatever a loader raises, the checkpoint is not one that users can load
        if is_out_of_memory(error):
            raise
        loader = "preln" if compact else "plain transformers"
        raise InputError(f"checkpoint: {loader} does not load it: {_first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            name = sorted(map(str, report[kind]))[0]
            raise InputError(f"checkpoint: {kind.replace('_', ' ')} on reload: {name}")
    loaded = (loaded if getattr(loaded, "is_quantized", False) else loaded.to(model.device)).eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(model.device)
    training = model.training
    try:
        model.eval()
        expected = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    found = loaded(input_ids=ids, use_cache=False).logits
    worst = _difference(found, expected)
    if not worst <= 1e-5:
        raise InputError(f"checkpoint: logits after reloading differ by {worst:.1e} of their size")
    _check_cache(loaded, ids)


def _check_refused(folder: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """See that plain transformers loads no compact checkpoint, be it by the automatic class or by its own.

    Raises:
        InputError: It did, with random weights where the branches are gone.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    classes: list[Any] = [AutoModelForCausalLM, type(model).__mro__[2]]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        for loader in classes:
            try:
                loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception:  # any refusal is what is hoped for
                continue
            raise InputError("checkpoint: plain transformers loads it, with random weights in the gaps")
    finally:
        logging.set_verbosity(verbosity)


def _difference(a: Tensor, b: Tensor) -> float:
    """``max|a - b| / max|b|``; NaN when either holds NaN."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30))


def _check_cache(model: PreTrainedModel, ids: Tensor) -> None:
    """Greedy generation with the cache on against the cache off, by the logits of each new token.

    Tokens alone are no test: two near-equal logits may swap by rounding. Steps are compared until the first
    one whose token differs, which is legitimate only where the logits agree.
    """
    from transformers import GenerationConfig

    generator: Any = model  # generate is not among PreTrainedModel's own attributes
    runs = []
    for use_cache in (True, False):
        settings = GenerationConfig(
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        try:
            mask = torch.ones_like(ids)
            runs.append(generator.generate(ids, attention_mask=mask, generation_config=settings))
        except Exception as error:  # generation breaks in many ways when cache indices are wrong
            if is_out_of_memory(error):
                raise
            line = _first_line(error)
            raise InputError(f"checkpoint: generation fails with use_cache={use_cache}: {line}") from error
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    for step, (cached, plain) in enumerate(zip(runs[0].logits, runs[1].logits, strict=True)):
        worst = _difference(cached, plain)
        if not worst <= tolerance:
            raise InputError(f"checkpoint: with the cache, new token {step} has other logits ({worst:.1e})")
        place = ids.shape[1] + step
        if not torch.equal(runs[0].sequences[:, place], runs[1].sequences[:, place]):
            break
