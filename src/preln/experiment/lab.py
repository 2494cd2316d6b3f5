"""What the steps of a study share: the model, its tokens, and the models made from it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.files import read_json
from preln.data import describe, fingerprint, load_rows, load_tokens
from preln.experiment.sections import Data, HealRun, Rows, healed_name
from preln.experiment.store import WORK, RunStore
from preln.experiment.study import Study
from preln.heal import Cache, Examples, apply_trained, as_examples, get_recipe
from preln.heal.prefix.cache import frozen_depth
from preln.models import anatomy, drop_blocks, load_model, model_fingerprint
from preln.prune import read_plan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Lab:
    """Loads each thing once, when a step first asks for it.

    Args:
        study: The study.
        store: The run folder that finished steps are read from.
    """

    def __init__(self, study: Study, store: RunStore) -> None:
        self.study, self.store = study, store
        self._caches: dict[str, Cache] = {}

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        study = self.study
        told = {} if study.device_map == "none" else {"device_map": study.device_map}
        return load_model(study.model, device=study.device, dtype=study.dtype, seed=study.seed, **told)

    @property
    def model(self) -> PreTrainedModel:
        """The unpruned model."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._loaded[1]

    @functools.cached_property
    def num_blocks(self) -> int:
        """Number of blocks of the unpruned model."""
        return anatomy(self.model).num_blocks

    @functools.cached_property
    def tokens(self) -> dict[str, Any]:
        """Every data set of the study by name: token windows ``[n, T]``, or examples made from rows."""
        found: dict[str, Tensor | Examples] = {}
        for name in Data.model_fields:
            spec = getattr(self.study.data, name)
            if isinstance(spec, Rows):
                found[name] = self._examples(name, spec)
                continue
            found[name] = load_tokens(
                spec.source,
                self.tokenizer,
                sequences=spec.sequences,
                length=spec.length,
                seed=spec.seed,
                split=spec.split,
            )
        return found

    def _examples(self, name: str, spec: Rows) -> Examples:
        """The first windows that the rows of a source make, in their order by hash."""
        rows = load_rows(
            spec.rows, split=spec.split, limit=spec.sequences * max(1, spec.length // 8), seed=spec.seed
        )
        examples = as_examples(
            rows,
            tokenizer=self.tokenizer,
            length=spec.length,
            name=f"data.{name}",
            packed=spec.packed,
            template=spec.template,
            supervise=spec.supervise,
        )
        if len(examples) < spec.sequences:
            raise InputError(
                f"data.{name}: the rows of {spec.rows} make {len(examples)} windows of {spec.length} "
                f"tokens, not {spec.sequences}: ask for fewer or shorter ones, or name a larger source"
            )
        return examples.take(range(spec.sequences))

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Hashes of the model and of every data set: what results depend on beside the study's text."""
        study = self.study
        return {
            "model": {"name": study.model, "sha256": model_fingerprint(self.model)},
            "data": {
                name: {
                    "source": describe(_source(getattr(study.data, name))),
                    "sha256": _fingerprint(tokens),
                    "shape": list(_ids(tokens).shape),
                }
                for name, tokens in self.tokens.items()
            },
            "attn_implementation": str(getattr(self.model.config, "_attn_implementation", None)),
        }

    def pruned(self, name: str) -> PreTrainedModel:
        """The pruned model of a finished prune step."""
        return drop_blocks(self.model, read_plan(self.store.root / f"prune-{name}" / "plan.yaml").drop)

    def cache(self, pruned: str) -> Cache:
        """Where the frozen prefix of a pruned model is stored, for all runs that heal it."""
        if pruned not in self._caches:
            count = self.num_blocks - len(self.result(f"prune-{pruned}")["drop"])
            recipes = {run.recipe for run in self.study.heal_runs if pruned in run.models}
            depths = {frozen_depth(get_recipe(recipe), count) for recipe in recipes} - {0}
            folder = self.store.root / WORK / "prefix" / pruned
            self._caches[pruned] = Cache(folder, depths=sorted(depths))
        return self._caches[pruned]

    def healed(self, pruned: str, run: HealRun) -> PreTrainedModel:
        """The healed model of a finished heal step."""
        from safetensors.torch import load_file

        folder = self.store.root / f"heal-{healed_name(pruned, run)}"
        return apply_trained(
            self.pruned(pruned),
            run.recipe,
            load_file(folder / "weights.safetensors"),
            drop=self.result(f"prune-{pruned}")["drop"],
        )

    def result(self, step: str) -> dict[str, Any]:
        """The ``result.json`` of a finished step."""
        return read_json(self.store.root / step / "result.json")

    def path(self, step: str, file: str) -> Path:
        """A file of a finished step."""
        return self.store.root / step / file


def _source(spec: Any) -> str:
    return spec.rows if isinstance(spec, Rows) else spec.source


def _ids(tokens: Tensor | Examples) -> Tensor:
    return tokens.input_ids if isinstance(tokens, Examples) else tokens


def _fingerprint(tokens: Tensor | Examples) -> str:
    return tokens.fingerprint() if isinstance(tokens, Examples) else fingerprint(tokens)
