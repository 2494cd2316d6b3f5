"""Several variants of one model on the same tasks: what they have in common is done once."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preln.base.errors import InputError, require
from preln.evaluate.harness import check_counts, outcome
from preln.evaluate.leading import Leading, shared_depth
from preln.evaluate.quiet import quiet, seeded
from preln.evaluate.stock import LoadedTasks, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GIB = 2**30


def evaluate_variants(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | float | None = None,
    batch_size: int = 8,
    source: str | os.PathLike[str] = "auto",
    seed: int = 0,
    budget: int = 2 * _GIB,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval tasks on several models that share a tokenizer, as :func:`evaluate_tasks` would on each.

    Done once: loading the tasks, turning requests into tokens, and the blocks at the start that all variants
    have in common (found by comparing weights and states, see ``shared_depth``), whose outputs are kept in
    memory up to a budget. For tasks that score given answers, variants may be views on one model
    (:func:`preln.models.view`), which share its weights in memory; generation tasks need models of their own.

    Args:
        models: By name; they are left as they were.
        tokenizer: The tokenizer of all of them; copies are used.
        tasks: Names of lm-eval tasks, groups or tags.
        limit: Documents a task, or a share below 1.
        batch_size: Requests in one forward pass.
        source: Where benchmark rows come from, see :func:`preln.data.locate`.
        seed: For tasks that draw, the same for every model.
        budget: Bytes of memory for the outputs of the shared blocks; 0 shares no block.

    Returns:
        By name what :func:`evaluate_tasks` returns, with ``model`` (the name) and in ``settings``
        ``shared_blocks`` and ``reused_batches``.

    Raises:
        InputError: There is no model, or as :func:`evaluate_tasks`.
    """
    if not models:
        raise InputError("no model to evaluate: name at least one")
    check_counts(limit, batch_size)
    require("lm_eval", extra="eval")
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    encoded: dict[tuple[Any, ...], list[int]] = {}
    results = {}
    try:
        for model in models.values():
            model.eval()
        leading = Leading(
            shared_depth(list(models.values())) if budget > 0 and len(models) > 1 else 0, budget
        )
        with quiet(), seeded(seed):
            loaded = load_tasks([tasks] if isinstance(tasks, str) else list(tasks), source=source, seed=seed)
        for name, model in models.items():
            before = leading.reused
            leading.begin(model)
            for task in loaded.tasks["tasks"].values():  # or the next model would see other examples
                task.set_fewshot_seed(seed=seed)
            with quiet(), seeded(seed):
                wrapper = _wrapper(encoded, leading)
                wrapped = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
                raw = _run(wrapped, loaded, limit)
            told: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "seed": seed}
            told |= {"shared_blocks": leading.depth, "reused_batches": leading.reused - before}
            results[name] = {"model": name, **outcome(model, raw, loaded, **told)}
    finally:
        for module, mode in modes:
            module.training = mode
    return results


def _wrapper(encoded: dict[tuple[Any, ...], list[int]], leading: Leading) -> Any:
    """lm-eval's model class with a memory of what it turned into tokens, and of the shared blocks."""
    from lm_eval.models.huggingface import HFLM

    base: Any = HFLM  # its signature is hidden by a decorator

    class Variant(base):
        """One of several models over the same requests."""

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            """Token ids, remembered from the models before."""
            key = (string, args, tuple(sorted(kwargs.items())))
            if key not in encoded:
                encoded[key] = super().tok_encode(string, *args, **kwargs)
            return list(encoded[key])

        @torch.no_grad()
        def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
            return leading.logits(inps)

    return Variant


def _run(wrapped: Any, loaded: LoadedTasks, limit: int | float | None) -> dict[str, Any]:
    """lm-eval's evaluator over the loaded tasks; it builds their requests anew for every model."""
    from lm_eval.evaluator import evaluate

    run: Any = evaluate
    return dict(run(wrapped, task_dict=loaded.tasks, limit=limit, bootstrap_iters=1000))
