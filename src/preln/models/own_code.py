"""Code that a checkpoint brings along: run only if its class is asked for by name, and shown before."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import read_json

_CONFIGS = ("config.json", "tokenizer_config.json")


def asks_for_code(location: str, spec: str, name: str | None) -> bool:
    """Whether the code of a checkpoint is to be run; what will be run is printed on stderr.

    Args:
        location: The checkpoint's folder, or its name on the hub.
        spec: What the user called it.
        name: The class that the user asked for, as ``modeling_own.OwnForCausalLM``; None runs no code.

    Returns:
        False if ``name`` is None.

    Raises:
        InputError: Only its own code knows the model, and nothing was asked for; it brings none, or another
            class than ``name``; the code is not in the folder.
    """
    folder = Path(location)
    found = _classes(folder) if folder.is_dir() else {}
    offered = found.get("AutoModelForCausalLM")
    if name is None:
        if offered is not None and not _is_known(folder):
            raise InputError(
                f"{spec}: is a model by its own code, which is not run: read its {_module(offered)}, and ask "
                f"for it by --own-code {offered}"
            )
        return False
    if not folder.is_dir():
        raise InputError(
            f"{spec}: own code is run from a folder only: fetch the checkpoint, and read its code"
        )
    if offered is None:
        raise InputError(f"{spec}: brings no causal model's code: leave out --own-code {name}")
    if name != offered:
        raise InputError(f"--own-code {name}: {spec} brings {offered}: read its code, and ask for that")
    for path in _files(folder, spec, found):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        lines = len(content.splitlines())
        print(f"{spec}: runs its own code: {path.name}, {lines} lines, sha256 {digest}", file=sys.stderr)
    return True


def runs_own_code(model: object) -> bool:
    """Whether a model's class comes from a checkpoint's own code, and not from transformers."""
    return any(kind.__module__.partition(".")[0] == "transformers_modules" for kind in type(model).__mro__)


def _is_known(folder: Path) -> bool:
    """Whether transformers has a class of its own for the model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return read_json(folder / "config.json").get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _classes(folder: Path) -> dict[str, str]:
    """The classes that the configurations name for transformers' automatic ones."""
    found: dict[str, str] = {}
    for name in _CONFIGS:
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # whoever reads it next says so
            continue
        told = values.get("auto_map") if isinstance(values, dict) else None
        for kind, value in (told if isinstance(told, dict) else {}).items():
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, str):
                    found.setdefault(kind, entry)
    return found


def _module(reference: str) -> str:
    """The file of a class, such as ``modeling_own.py``."""
    return f"{reference.rpartition('.')[0]}.py"


def _files(folder: Path, spec: str, found: dict[str, str]) -> list[Path]:
    """The files that hold these classes, and those that they import from the folder.

    Raises:
        InputError: One is not in the folder, or in another repository.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    chosen: dict[str, Path] = {}
    for reference in found.values():
        path = folder / _module(reference)
        if "--" in reference or path.parent != folder or not path.is_file():
            raise InputError(f"{spec}: the code of {reference} is not in the folder: fetch it, and read it")
        more: list[Any] = get_relative_import_files(path)
        chosen |= {file.name: file for file in (path, *map(Path, more))}
    return [chosen[name] for name in sorted(chosen)]
