"""From a name to a model and its tokenizer: packaged, local, GGUF, hub, or tiny and random."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.faults import is_out_of_memory
from preln.base.files import verify_checksums
from preln.base.packages import cache_dir
from preln.models.agreement import check_sizes
from preln.models.choices import check_attention, check_device, check_dtype
from preln.models.compact import is_compact, is_compact_folder, load_compact
from preln.models.own_code import asks_for_code
from preln.models.packaged import PACKAGED, convert_gguf, packaged_folder
from preln.models.spread import settle
from preln.models.tiny import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TIMEOUT_S = 10
# a shape that disagrees is reported like a missing weight, and refused by its name
WEIGHTS = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that holds NaN or infinite weights.

    Raises:
        InputError: Naming the first such tensor.
    """
    import torch

    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{name}: the weight {key!r} holds NaN or infinite values: get the files again")


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all weights, in hexadecimal."""
    import torch

    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hub_folder_or_error(spec: str) -> str:
    """``spec`` if it is cached or the hub answers for it, within seconds.

    Raises:
        InputError: No such model, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    ways = f"a folder, a .gguf file, tiny:llama, or a packaged model ({', '.join(sorted(PACKAGED))})"
    if not _HUB_ID.fullmatch(spec):
        raise InputError(f"{spec}: no such file or folder, and no hub id: name {ways}")
    if isinstance(try_to_load_from_cache(spec, "config.json"), str):
        return spec
    if HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise InputError(f"{spec}: unknown here, and the model hub is switched off: name {ways}")
    try:
        HfApi().model_info(spec, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # the hub client raises errors of its own and of its transport
        kind = type(error).__name__
        raise InputError(f"{spec}: the model hub has no answer for it ({kind}): name {ways}") from error
    return spec


def _locate(spec: str) -> str:
    """The folder or hub id that transformers loads for ``spec``."""
    if spec in PACKAGED:
        return str(packaged_folder(spec))
    path = Path(spec).expanduser()
    if spec.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"{spec}: no such file: check the path")
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
        target = cache_dir() / "models" / f"gguf-{key}"
        return str(target if target.is_dir() else convert_gguf(path.resolve(), target))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{spec}: holds no config.json: name the folder of a Hugging Face checkpoint")
        return str(path)
    if path.exists():
        raise InputError(f"{spec}: is a file: name a checkpoint folder or a .gguf file")
    return _hub_folder_or_error(spec)


def load_model(
    spec: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    seed: int = 0,
    device_map: str | dict[str, Any] | None = None,
    own_code: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal model, in evaluation mode, and its tokenizer.

    Only safetensors (or GGUF) weights are read, and no code of a checkpoint is run but ``own_code``.

    Args:
        spec: ``smollm2-135m``, a checkpoint folder, a ``.gguf`` file, a hub id, or ``tiny:llama`` and its
            like (``tiny:llama:8`` for eight blocks).
        device: Where the model goes; ``auto`` spreads a checkpoint over all devices (accelerate).
        dtype: ``float32``, ``float64``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own.
        attn_implementation: ``eager``, ``sdpa``, …; None for transformers' choice.
        seed: For the weights of ``tiny:`` models.
        device_map: Where each part of a checkpoint goes (accelerate), in place of ``device``: ``auto``, or a
            device for every module. For measuring: a model that is spread is not trained.
        own_code: The class of a model that is no part of transformers, in a Python file of the checkpoint's
            folder, as ``modeling_own.OwnForCausalLM``. What is run is shown on stderr: file, lines, SHA-256.

    Raises:
        InputError: Unknown model, unreachable hub, incomplete or non-finite weights, an encoder-decoder; a
            part that no device has room for.
    """
    check_device(device)
    check_dtype(dtype)
    check_attention(attn_implementation)
    if spec.startswith("tiny:"):
        if own_code is not None:
            raise InputError(f"{spec}: runs no code of its own: leave out --own-code {own_code}")
        name, _, count = spec.removeprefix("tiny:").partition(":")
        if count and not re.fullmatch(r"\d{1,3}|1000", count, flags=re.ASCII):
            raise InputError(
                f"{spec}: the number of blocks must be a whole number up to 1000, as in tiny:llama:8"
            )
        try:
            model = tiny_model(
                name, blocks=int(count or 4), seed=seed, attn_implementation=attn_implementation
            )
        except (ImportError, ValueError) as error:  # transformers, of an attention that is not to be had
            raise InputError(f"{spec}: {_first_line(error)}") from error
        tokenizer = tiny_tokenizer()
        model = model if dtype == "auto" else _in_dtype(model, getattr(_torch(), dtype))
    else:
        keywords = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        spread = {"device_map": device_map or "auto"} if device_map or device == "auto" else {}
        location = _locate(spec)
        trusted = asks_for_code(location, spec, own_code)
        model, tokenizer = _from_pretrained(location, spec, dtype, keywords | spread, trusted)
    if device_map or device == "auto":
        settle(model, spec)
    check_finite(model, spec)
    placed: Any = model
    return (placed if device_map or device == "auto" else placed.to(device)).eval(), tokenizer


def _torch() -> Any:
    import torch

    return torch


def _weights(location: str, spec: str, keywords: dict[str, Any], trusted: bool) -> Any:
    """A model, plain or without some branches, and what transformers reports about its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_compact_folder(location):
        return load_compact(location, **keywords)
    config = AutoConfig.from_pretrained(location, trust_remote_code=trusted)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{spec}: is an encoder-decoder: preln measures decoder-only models")
    check_sizes(config, location, spec)
    return AutoModelForCausalLM.from_pretrained(location, trust_remote_code=trusted, **keywords)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _in_dtype(model: PreTrainedModel, dtype: Any) -> PreTrainedModel:
    """The model with its weights in a dtype, and what is not stored with them as it was computed."""
    stored = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
    return model


def _from_pretrained(
    location: str, spec: str, dtype: str, keywords: dict[str, Any], trusted: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load with transformers, and turn what it says into one line."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if Path(location).is_dir():
        verify_checksums(location)
    keywords = keywords | {"dtype": dtype if dtype == "auto" else getattr(_torch(), dtype)}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = _weights(location, spec, keywords | WEIGHTS, trusted)
        # a compact model's own configuration, since the one on disk is of no type that transformers knows
        known = {"config": model.config} if is_compact(model) else {}
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trusted, **known)
    except InputError:
        raise
    except Exception as error:  # whatever the libraries raise for broken or foreign folders
        if is_out_of_memory(error):
            raise  # the folder is not to blame
        raise InputError(
            f"{spec}: cannot be loaded as a causal language model ({_first_line(error)})"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    # of what is stored and not used, only a block's weights show that the configuration counts too few
    more = [key for key in info["unexpected_keys"] if re.search(r"\.\d+\..*weight$", key)]
    shapes = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    wrong = [*info["missing_keys"], *shapes, *more]
    if wrong:
        raise InputError(f"{spec}: weights and configuration disagree at {wrong[0]!r}: get the files again")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(f"{spec}: the tokenizer has {len(tokenizer)} tokens, the model {rows}: not a pair")
    return model, tokenizer
