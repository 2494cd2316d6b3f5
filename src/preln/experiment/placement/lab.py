"""What the steps of a placement study share: the tokens, and the models by placement and seed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.base.files import read_json
from preln.data import describe, fingerprint, load_tokens
from preln.experiment.engines import Engine
from preln.experiment.placement.study import PlacementData, PlacementStudy
from preln.experiment.store import RunStore
from preln.models import model_fingerprint, tiny_tokenizer
from preln.models.choices import check_device
from preln.models.scratch import ScratchForCausalLM, scratch_model

DTYPES = ("float32", "float64")


class PlacementLab:
    """Loads each set of tokens once, when a step first asks for it.

    Args:
        study: The study.
        store: The run folder that finished steps are read from.
        engine: Where steps are to run.

    Raises:
        InputError: Another engine than the local one, a device that is not here, or half precision.
    """

    def __init__(self, study: PlacementStudy, store: RunStore, engine: Engine) -> None:
        if engine.name != "local":
            raise InputError(f"--engine {engine.name}: placement studies run locally: leave --engine out")
        if study.dtype not in DTYPES:
            raise InputError(f"--dtype {study.dtype}: models are trained in one of {', '.join(DTYPES)}")
        check_device(study.device)
        self.study, self.store = study, store

    @functools.cached_property
    def tokenizer(self) -> Any:
        """One token a byte: a vocabulary that small models can learn, and nothing to train beforehand."""
        return tiny_tokenizer()

    @functools.cached_property
    def tokens(self) -> dict[str, Tensor]:
        """Token windows ``[n, T]`` of every data set of the study, by name."""
        found = {}
        for name in PlacementData.model_fields:
            spec = getattr(self.study.data, name)
            told = {"sequences": spec.sequences, "length": spec.length, "seed": spec.seed}
            found[name] = load_tokens(spec.source, self.tokenizer, split=spec.split, **told)
        return found

    def untrained(self, placement: str, seed: int) -> ScratchForCausalLM:
        """A model with its initial values."""
        sizes = self.study.sizes.model_dump() | {"vocab_size": len(self.tokenizer)}
        model = scratch_model(placement, seed=seed, **sizes)
        placed: Any = model
        return placed.to(device=self.study.device, dtype=getattr(torch, self.study.dtype))

    def trained(self, placement: str, seed: int) -> ScratchForCausalLM:
        """The model of a finished train step."""
        from safetensors.torch import load_file

        model = self.untrained(placement, seed)
        model.load_state_dict(load_file(self.path(f"train-{placement}-s{seed}", "weights.safetensors")))
        return model

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Hashes of the first model's initial values and of every data set."""
        first = self.untrained(self.study.placements[0], self.study.seeds[0])
        return {
            "model": {
                "name": f"from scratch: {', '.join(self.study.placements)}",
                "sha256": model_fingerprint(first),
            },
            "data": {
                name: {
                    "source": describe(getattr(self.study.data, name).source),
                    "sha256": fingerprint(tokens),
                    "shape": list(tokens.shape),
                }
                for name, tokens in self.tokens.items()
            },
            "attn_implementation": str(first.config._attn_implementation),
        }

    @property
    def num_blocks(self) -> int:
        """Number of blocks of every model."""
        return self.study.sizes.num_hidden_layers

    def result(self, step: str) -> dict[str, Any]:
        """The ``result.json`` of a finished step."""
        return read_json(self.path(step, "result.json"))

    def path(self, step: str, file: str) -> Path:
        """A file of a finished step."""
        return self.store.root / step / file
