"""A disk that is full, read-only or refuses: one line names file and mend; with room again all is equal."""

import errno
import os
import resource
import subprocess

import pytest

from preln import cli
from preln.base import faults, files
from preln.base.errors import InputError

from . import commands

pytestmark = pytest.mark.integration
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TRIED = {
    "run": 6,
    "report": 5,
}  # places of a verb's writes that are tried; all of them in the nightly profile


def places(verb, count):
    """The first writes, the last, and some between."""
    wanted = count if THOROUGH else min(count, TRIED.get(verb, 7))
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def is_clean(verb, folder, out):
    """Whether nothing half-written is there: of a run or a report what is whole may be."""
    assert commands.unfinished(folder) == []
    if verb == "run":
        from preln.experiment import RunStore

        for step in out.glob("*/step.json"):
            RunStore(out).verified(step.parent.name)
        return True
    if verb == "report":
        return not (out / "index.html").exists()  # it is written last
    return not out.exists()


@pytest.mark.parametrize("verb", commands.VERBS)
def test_a_full_disk_at_any_write_is_told_and_the_same_command_ends_the_same(
    verb, prepared, undisturbed, disk, tmp_path, capsys, quick_figures
):
    expected, count = undisturbed(verb, disk)
    assert count >= 10
    for place in places(verb, count):
        folder = tmp_path / str(place)
        folder.mkdir()
        words = [*commands.commands(prepared)[verb], "--out", str(folder / "out")]
        capsys.readouterr()
        with disk.after(place, folder):
            assert cli.main(words) == 2, place
            assert disk.count > place
        line = commands.one_line(capsys.readouterr().err)
        assert str(folder / "out") in line, line
        assert "No space left on device" in line and "make room and run the same command again" in line
        assert ".part" not in line
        assert is_clean(verb, folder, folder / "out"), place
        assert cli.main(words) == 0, place
        assert commands.results(folder / "out") == expected, place


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("verb", commands.VERBS)
def test_a_folder_that_refuses_is_named_before_the_work(
    verb, number, prepared, disk, tmp_path, capsys, monkeypatch
):
    def work(*_args, **_kwargs):
        raise AssertionError("work began")

    for name in ("preln.probe.probe_tables", "preln.prune.carry_out", "preln.prune.score_any"):
        monkeypatch.setattr(name, work)
    monkeypatch.setattr("preln.heal.heal_model", work)
    monkeypatch.setattr("preln.experiment.run.run_steps", work)
    with disk.after(0, tmp_path, number):
        assert cli.main([*commands.commands(prepared)[verb], "--out", str(tmp_path / "a" / "out")]) == 2
    line = commands.one_line(capsys.readouterr().err)
    assert os.strerror(number) in line and "name another --out" in line
    assert list(tmp_path.iterdir()) == []


def mounted(folder, size):
    """A small file system of its own, or a skip where nothing can be mounted."""
    folder.mkdir()
    answer = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "preln-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if answer.returncode:
        pytest.skip("mounting a small file system takes root's rights")


def again(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    mounted(folder, "64k")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("verb", commands.VERBS[:-1])
def test_a_real_disk_that_is_full(verb, small_disk, prepared, undisturbed, disk, capfd):
    """Also native writers (Parquet, safetensors, tokenizers) meet it; sizes from nothing to nearly enough."""
    expected, _ = undisturbed(verb, disk)
    out, refused = small_disk / "out", 0
    words = [*commands.commands(prepared)[verb], "--out", str(out)]
    (small_disk / "filler").write_bytes(bytes(60 * 1024))
    for size in ("64k", "72k", "128k", "512k", "16m"):
        again(small_disk, f"size={size}")
        capfd.readouterr()
        if cli.main(words) == 0:
            break
        refused += 1
        line = commands.one_line(capfd.readouterr().err)
        assert str(small_disk) in line and ("No space left" in line or "the disk has left" in line), line
        assert is_clean(verb, small_disk, out)
    assert refused >= 1
    assert commands.results(out) == expected


@pytest.mark.parametrize("verb", commands.VERBS)
def test_a_real_read_only_folder(verb, small_disk, prepared, capfd):
    again(small_disk, "ro")
    assert cli.main([*commands.commands(prepared)[verb], "--out", str(small_disk / "out")]) == 2
    assert "Read-only file system" in commands.one_line(capfd.readouterr().err)
    again(small_disk, "rw")
    assert list(small_disk.iterdir()) == []


def test_a_limit_on_the_size_of_a_file(prepared, tmp_path):
    """Rust's writer of weights meets it, and says so in words of its own."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    words = [*commands.commands(prepared)["prune"], "--out", str(tmp_path / "out")]
    ended = commands.carry_out(words, tmp_path, limit)
    assert ended.code == 2
    assert "File too large" in (line := commands.one_line(ended.errors)), line
    assert "ulimit -f" in line and str(tmp_path / "out") in line
    assert list(tmp_path.iterdir()) == []
    assert commands.carry_out(words, tmp_path).code == 0


def test_full_standard_output_is_told(tmp_path):
    def full():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    ended = commands.carry_out(["sources"], tmp_path, full)
    assert ended.code == 2
    assert "standard output" in commands.one_line(ended.errors)


def test_the_errors_of_a_disk_are_told_from_others(tmp_path):
    """Wrapped ones are found; what was refused for a reason of its own is not told anew."""
    wrapped = InputError("x: transformers cannot save this model")
    wrapped.__cause__ = RuntimeError("I/O error: No space left on device (os error 28)")
    with (
        pytest.raises(faults.DiskError, match=r"out: cannot be written \(No space left"),
        faults.writing("out"),
    ):
        raise wrapped
    unreadable = InputError("data: cannot be read")
    unreadable.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(InputError, match="cannot be read"), faults.writing("out"):
        raise unreadable
    with pytest.raises(FileNotFoundError), faults.writing("out"):
        raise FileNotFoundError(errno.ENOENT, "no", "data")
    with pytest.raises(ZeroDivisionError), faults.writing("out"):
        raise ZeroDivisionError
    with pytest.raises(faults.DiskError, match=r"^other: "), faults.writing("out"):
        raise OSError(errno.ENOSPC, "full", "other")
    assert faults.disk_fault(ValueError("error 28")) is None


def test_an_error_of_the_system_without_a_name_of_ours_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["probe", commands.MODEL, "--out", "x" * 300]) == 2
    assert "File name too long" in commands.one_line(capsys.readouterr().err)


def test_a_folder_that_is_being_replaced_is_never_lost(tmp_path, monkeypatch):
    """Between the two renames an error, or the end of the process, leaves the former folder."""
    target = tmp_path / "a"
    with files.staged_directory(target) as folder:
        (folder / "x").write_text("old")
    replace = os.replace

    def refuse_second(source, place):
        if str(source).endswith(".part"):
            raise OSError(errno.ENOSPC, "full")
        replace(source, place)

    monkeypatch.setattr(os, "replace", refuse_second)
    with pytest.raises(InputError, match="No space"), files.staged_directory(target, replace=True) as folder:
        (folder / "x").write_text("new")
    assert (target / "x").read_text() == "old" and commands.unfinished(tmp_path) == []
    monkeypatch.undo()

    def die():
        os.replace = lambda s, p: os._exit(9) if str(s).endswith(".part") else replace(s, p)
        with files.staged_directory(target, replace=True) as folder:
            (folder / "x").write_text("new")

    assert commands.carry_out(["sources"], tmp_path, die).code == 9
    assert not target.exists()
    with files.staged_directory(target, replace=True) as folder:
        assert (target / "x").read_text() == "old"
        (folder / "x").write_text("new")
    assert (target / "x").read_text() == "new" and commands.unfinished(tmp_path) == []
