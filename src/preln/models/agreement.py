"""Whether a checkpoint's configuration can belong to its weights, asked before a model is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preln.base.errors import InputError


def check_sizes(config: Any, location: str, spec: str) -> None:
    """Refuse a folder whose configuration has more blocks than its weights, or far wider ones.

    transformers would first make every missing weight up, which takes hours where a count is absurd.

    Raises:
        InputError: They disagree.
    """
    from safetensors import safe_open

    names: set[str] = set()
    longest = 0
    for path in sorted(Path(location).glob("*.safetensors")) if Path(location).is_dir() else ():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                names.add(name)
                longest = max(longest, *file.get_slice(name).get_shape(), 1)
    if not names:
        return  # another format, which transformers looks at
    text = config.get_text_config()
    stored = 1 + max(
        (int(part) for name in names for part in name.split(".") if part.isdecimal()), default=-1
    )
    limits = {"num_hidden_layers": stored, "hidden_size": longest, "vocab_size": longest}
    limits["intermediate_size"] = limits["vocab_size"] * 8  # packed weights hold up to eight numbers in one
    for key, limit in limits.items():
        value = getattr(text, key, None)
        if isinstance(value, int) and value > limit:
            raise InputError(
                f"{spec}: weights and configuration disagree at {key} ({value} against at most {limit}): "
                "get the files again"
            )
