"""A model's configuration without its weights, and the model on the meta device: shapes and no numbers."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.packages import cache_dir
from preln.models.packaged import PACKAGED
from preln.models.tiny import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class Known:
    """A configuration and where it comes from.

    Attributes:
        config: Of transformers.
        source: ``folder``, ``file``, ``hub``, ``tiny`` or ``table`` (the built-in one), for people.
    """

    config: Any
    source: str


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """The built-in configurations by hub id, those of equal shapes too: source, parameters, config.

    >>> table()["meta-llama/Llama-3.1-8B"]["parameters"]
    8030261248
    """
    stored = json.loads(files("preln.models").joinpath("configs.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for name, entry in stored["models"].items():
        own = {key: entry[key] for key in ("source", "parameters", "config")}
        found |= dict.fromkeys([name, *entry.get("same_as", ())], own)
    return found


def read_config(spec: str) -> Known:
    """The configuration that :func:`preln.models.load_model` would load for ``spec``; no weights are read.

    In this order: a tiny model, a folder, a ``.gguf`` file, a packaged model that is there already, the
    hub's cache, the hub where it answers within seconds, the built-in table.

    Raises:
        InputError: None of them knows the model, or what they hold is no configuration of a decoder.
    """
    if spec.startswith("tiny:"):
        return Known(_tiny(spec), "tiny")
    place = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not place.is_file():
            raise InputError(f"{spec}: no such file: check the path")
        return Known(_read(str(place.parent), spec, gguf_file=place.name), "file")
    if spec in PACKAGED:
        place = cache_dir() / "models" / f"{spec}-{PACKAGED[spec].wheel_sha256[:12]}"
        if not (place / "config.json").is_file():
            return Known(_from_table(spec), "table")
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise InputError(f"{spec}: holds no config.json: name the folder of a Hugging Face checkpoint")
        return Known(_read(str(place), spec), "folder")
    found = _from_hub(spec)
    if found is not None:
        return Known(found, "hub")
    if spec in table():
        return Known(_from_table(spec), "table")
    known = ", ".join(sorted(table()))
    raise InputError(
        f"{spec}: no configuration: the hub has no answer for it, and it is none of {known}: "
        "give a folder with its config.json"
    )


def meta_model(config: Any, dtype: str = "float32") -> PreTrainedModel:
    """A model of shapes alone: parameters on the meta device, which holds no numbers and takes no memory.

    Raises:
        InputError: transformers builds no causal model from the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    except Exception as error:  # whatever the library raises for foreign configurations
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = getattr(config, "model_type", type(config).__name__)
        raise InputError(f"{kind}: no causal language model can be built ({reason.strip()})") from error
    return model.eval()


def _tiny(spec: str) -> Any:
    name, _, count = spec.removeprefix("tiny:").partition(":")
    if count and not count.isdigit():
        raise InputError(f"{spec}: the number of blocks must be a whole number, as in tiny:llama:8")
    return tiny_model(name, blocks=int(count or 4)).config


def _from_table(spec: str) -> Any:
    from transformers import AutoConfig

    values = dict(table()[spec]["config"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _read(place: str, spec: str, **keywords: Any) -> Any:
    """What transformers reads, none of a checkpoint's own code being run."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **keywords)
    except Exception as error:  # whatever the library raises for broken or foreign folders
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{spec}: its configuration cannot be read ({reason.strip()})") from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{spec}: is an encoder-decoder: preln measures decoder-only models")
    return config


def _from_hub(spec: str) -> Any:
    """A hub model's configuration, from the hub's cache or fetched; None where there is no answer."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers

    try:
        cached = try_to_load_from_cache(spec, "config.json")
    except HFValidationError as error:
        raise InputError(f"{spec}: no such folder, and no hub id: check the name") from error
    if isinstance(cached, str):
        return _read(cached, spec)
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    # a plain request: the hub's client would try again for half a minute where there is no network
    request = urllib.request.Request(hf_hub_url(spec, "config.json"), headers=build_hf_headers())
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S) as answer:
            text = answer.read()
    except (OSError, ValueError):  # no network, no such model, or one that wants a licence accepted
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(text)
        return _read(folder, spec)
