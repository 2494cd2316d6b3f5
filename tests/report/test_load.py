"""A run is read whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.report.load import load_run


def test_tables_are_those_of_the_files(run_folder: Path) -> None:
    run = load_run(run_folder)
    assert run.name == "quickstart"
    pd.testing.assert_frame_equal(run.layers, pd.read_parquet(run_folder / "probe" / "layers.parquet"))
    pd.testing.assert_frame_equal(run.damage, pd.read_parquet(run_folder / "damage" / "damage.parquet"))
    assert len(run.prunes) == 3
    assert len(run.heals) == 9
    assert {claim["id"] for claim in run.claims} >= {"RMS-NORM", "CMP-PAPER"}
    assert len(run.verdicts) == 4
    assert set(run.training["id"]) == {heal["id"] for heal in run.heals}


def test_unfinished_step_is_not_read(run_folder: Path) -> None:
    run = load_run(run_folder)
    assert "heal-reverse-2-qlora" not in {step.id for step in run.steps}
    assert "UNFINISHED" not in {heal["loss_after"] for heal in run.heals}
    shutil.copy(run_folder / "probe" / "step.json", run_folder / "heal-reverse-2-qlora" / "step.json")
    with pytest.raises(InputError):  # once it claims to be finished, its files are demanded
        load_run(run_folder)


def test_folders_set_aside_are_not_read(run_folder: Path) -> None:
    shutil.copytree(run_folder / "probe", run_folder / ".probe.123.part")
    (run_folder / ".probe.123.part" / "layers.parquet").write_bytes(b"half a file")
    assert load_run(run_folder).layers is not None


@pytest.mark.parametrize(
    "name", ["probe/layers.parquet", "verify/ledger.json", "heal-reverse-2-lora/weights.safetensors"]
)
def test_flipped_byte_is_refused(run_folder: Path, name: str) -> None:
    path = run_folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=Path(name).name):
        load_run(run_folder)


def test_lost_file_is_refused(run_folder: Path) -> None:
    (run_folder / "damage" / "damage.parquet").unlink()
    with pytest.raises(InputError, match=r"damage\.parquet"):
        load_run(run_folder)


@pytest.mark.parametrize("step", ["verify", "probe", "score", "damage", "decide", "evaluate-dense"])
def test_missing_optional_step_is_tolerated(run_folder: Path, step: str) -> None:
    shutil.rmtree(run_folder / step)
    assert step not in {found.id for found in load_run(run_folder).steps}


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"])
def test_absent_or_damaged_manifest(run_folder: Path, content: str | bytes | None) -> None:
    path = run_folder / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"manifest\.json") as caught:
        load_run(run_folder)
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos"):
        load_run(tmp_path / "photos")


def edit_step(run: Path, step: str, **changes: object) -> None:
    record = json.loads((run / step / "step.json").read_text())
    (run / step / "step.json").write_text(json.dumps(record | changes))


def test_step_that_points_outside_is_refused(run_folder: Path) -> None:
    edit_step(run_folder, "probe", files={"../manifest.json": "0" * 64})
    with pytest.raises(InputError, match="outside"):
        load_run(run_folder)


def test_file_that_no_step_vouches_for_is_not_read(run_folder: Path) -> None:
    edit_step(run_folder, "probe", files={})
    assert load_run(run_folder).layers is None


def test_missing_column_and_key_are_named(run_folder: Path, write_step) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(run_folder / "damage")
    write_step(
        run_folder, "damage", "damage", {"damage.parquet": pd.DataFrame({"layer": [0], "loss": [1.0]})}
    )
    with pytest.raises(InputError, match=r"damage\.parquet.*'delta'"):
        load_run(run_folder)
    shutil.rmtree(run_folder / "damage")
    write_step(run_folder, "prune-x-1", "prune", {"result.json": {"metric": "x", "drop": [1]}})
    with pytest.raises(InputError, match=r"result\.json.*'loss'"):
        load_run(run_folder)
