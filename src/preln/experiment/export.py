"""A finished run without its weights: small enough to commit, with the hashes of what was left out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from preln.base.errors import InputError
from preln.base.files import read_json, staged_directory, write_json
from preln.experiment.store import RECORD, RunStore

# weights are large and made again by the study; lm-eval's own file holds paths of the machine it ran on
LEFT_OUT = ("weights.safetensors", "lm_eval.json")


def export_run(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Copy a finished run's tables to ``out``; every file is checked against its hash first.

    Each step's record moves the hashes of the files that stay behind from ``files`` to ``left_out``.

    Args:
        run: A run folder whose manifest says that it is finished.
        out: The folder to make; an existing export is replaced.

    Raises:
        InputError: The run is not finished, was made from uncommitted code, or a file was changed.
    """
    source = Path(run)
    manifest = read_json(source / "manifest.json")
    if manifest.get("status") != "finished":
        raise InputError(f"{source}: the run is not finished: run the study again")
    if manifest.get("git", {}).get("dirty"):
        raise InputError(f"{source}: was made from uncommitted code: commit, and run it in a new folder")
    store = RunStore(source)
    with staged_directory(out, replace=True) as staged:
        for name in ("manifest.json", "config.yaml"):
            shutil.copyfile(source / name, staged / name)
        for step in manifest["steps"]:
            record = store.verified(step)
            (staged / step).mkdir()
            kept = {name: value for name, value in record["files"].items() if name not in LEFT_OUT}
            for name in kept:
                (staged / step / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / step / name, staged / step / name)
            gone = {name: value for name, value in record["files"].items() if name in LEFT_OUT}
            write_json(staged / step / RECORD, {**record, "files": kept, "left_out": gone})
    return Path(out)
