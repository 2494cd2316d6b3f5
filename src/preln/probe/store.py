"""The folder of a probe: whole, or absent."""

from __future__ import annotations

import os
from pathlib import Path

from preln.base.files import staged_directory, write_json, write_parquet
from preln.probe.measure import ProbeResult


def write_probe(result: ProbeResult, out: str | os.PathLike[str]) -> Path:
    """Write the tables of a probe, one Parquet file each, and ``manifest.json`` into ``out``.

    Raises:
        InputError: ``out`` exists and is not empty, or cannot be written.
    """
    with staged_directory(out, checksums=True) as folder:
        names = ("layers", "pairs", "sequences", "resamples")
        tables = {name: getattr(result, name) for name in names}
        for name, table in tables.items():
            if table is not None:
                frame = table.copy()
                frame.attrs = {}  # the manifest holds them
                write_parquet(folder / f"{name}.parquet", frame)
        write_json(folder / "manifest.json", result.manifest)
    return Path(out)
