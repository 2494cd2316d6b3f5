"""A folder that a command has made is kept by the same command, told as at first, and by no other."""

import argparse
import json
import os
import signal
import time

import pytest

from preln import cli
from preln.base import files, journal
from preln.base.files import CHECKSUMS, hash_tree, maker_of, staged_directory
from preln.folders import command_of
from preln.prune.greedy import Stack

from . import commands

pytestmark = pytest.mark.integration
VERBS = ("probe", "score", "prune", "heal", "evaluate")
MORE = {  # what else a verb tells, by a name of the case
    "score-damage": ["score", "--damage", "1", "--metrics", "reverse,block_influence"],
    "prune-halves": ["prune", "--layers", "0a,1m"],
    "prune-laco": ["prune", "--method", "laco", "--drop", "1"],
    "heal-sweep": [
        *("heal", "--recipe", "head", "--sweep", "learning_rate=1e-3,1e-4", "--steps", "2"),
        *("--batch-size", "2", "--validation-sequences", "2"),
    ],
    "heal-adapter": ["heal", "--recipe", "lora", "--adapter", "--steps", "2", "--batch-size", "2"],
    "evaluate-all": [
        *("evaluate", "--positions", "--stride", "4", "--timed", "--new-tokens", "2"),
        *("--reference", "tiny:llama:4"),
    ],
}


def words_of(case, prepared):
    """The command line of a case, without ``--out``."""
    if case in VERBS:
        return commands.commands(prepared)[case]
    verb, *rest = MORE[case]
    data = ["--data", str(prepared / "text.jsonl"), "--sequences", "4", "--length", "16"]
    return [verb, commands.MODEL, *data, *rest]


def stamps(folder):
    """Every file's content and time: nothing was written."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("case", [*VERBS, *MORE])
def test_the_same_command_keeps_what_is_there_and_tells_the_same(case, prepared, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*words_of(case, prepared), "--out", str(out)]
    assert cli.main([*words, "--json"]) == 0
    *told, summary = capsys.readouterr().out.splitlines()
    (tmp_path / "out.resume").mkdir()
    before = stamps(out)
    assert cli.main([*words, "--json"]) == 0  # nor does it matter whether JSON is asked for
    said = capsys.readouterr()
    *again, last = said.out.splitlines()
    assert again == told
    assert json.loads(last) == {**json.loads(summary), "kept": True}
    assert commands.one_line(said.err) == f"preln: {out}: kept, for this command has made it"
    assert stamps(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", VERBS)
def test_killed_behind_its_last_write_it_has_ended(verb, prepared, undisturbed, disk, tmp_path, capsys):
    expected, _ = undisturbed(verb, disk)
    out = tmp_path / "out"
    words = [*commands.commands(prepared)[verb], "--out", str(out)]

    def die_when_whole():
        place = files.take_place

        def killed(temporary, target):
            place(temporary, target)
            if target == out:
                os.kill(os.getpid(), signal.SIGKILL)

        files.take_place = killed

    assert commands.carry_out(words, prepared, die_when_whole).code == -signal.SIGKILL
    assert out.is_dir() and (tmp_path / ".out.lock").exists()
    assert cli.main(words) == 0
    assert "kept" in capsys.readouterr().err
    assert commands.results(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", ["score", "prune"])
def test_killed_in_the_middle_of_greedy_rounds_it_goes_on_from_the_last(verb, prepared, tmp_path, capsys):
    data = ["--data", str(prepared / "text.jsonl"), "--sequences", "4", "--length", "16"]
    words = [verb, "tiny:llama:12", *data, "--metrics" if verb == "score" else "--metric", "sleb"]
    words += ["--drop", "8", "--json", "--out"]

    def hasty():
        journal.SECONDS = -1.0

    process = commands.Process([*words, str(tmp_path / "a")], prepared, hasty)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("a.resume/*/step-0000000[2-9]")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    tried, without = [], Stack.without
    said = {}
    for out in "ba":
        tried.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stack, "without", lambda *a: (tried.append(a[2]), without(*a))[1])
            assert cli.main([*words, str(tmp_path / out)]) == 0
        said[out] = json.loads(capsys.readouterr().out.splitlines()[-1]) | {"out": None, "tried": len(tried)}
    assert (
        0 < said["a"].pop("tried") < said["b"].pop("tried") - 12
    )  # the first round at least was not done again
    assert said["a"] == said["b"]
    assert commands.results(tmp_path / "a") == commands.results(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_no_other_command_keeps_it(prepared, tmp_path, capsys):
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_bytes((prepared / "text.jsonl").read_bytes())
    data = ["--data", str(text), "--sequences", "4", "--length", "16"]
    words = ["probe", commands.MODEL, *data, "--measures", "stream", "--out", str(out)]
    assert cli.main(words) == 0
    before = stamps(out)

    def refused(line):
        capsys.readouterr()
        assert cli.main(line) == 2
        assert "exists and is not an empty folder" in commands.one_line(capsys.readouterr().err)
        assert stamps(out) == before

    refused([*words, "--seed", "1"])
    refused(["probe", "tiny:gpt2:3", *words[2:]])
    refused(["score", commands.MODEL, *data, "--metrics", "reverse", "--out", str(out)])
    state = text.stat()
    text.write_text(text.read_text() + "\n", encoding="utf-8")
    refused(words)
    text.write_bytes((prepared / "text.jsonl").read_bytes())
    os.utime(text, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    refused(words)  # perhaps the same, but it was touched
    os.utime(text, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert cli.main(words) == 0


def test_what_was_changed_in_it_is_named(prepared, tmp_path, capsys):
    out = tmp_path / "out"
    words = [*commands.commands(prepared)["prune"], "--out", str(out)]
    assert cli.main(words) == 0
    plan, capsys_of = out / "plan.yaml", capsys.readouterr
    whole = plan.read_bytes()
    for broken, expected in ((bytes([whole[0] ^ 1]) + whole[1:], "was changed"), (None, "is missing")):
        plan.unlink()
        if broken is not None:
            plan.write_bytes(broken)
        capsys_of()
        assert cli.main(words) == 2
        assert str(plan) in (line := commands.one_line(capsys_of().err)) and expected in line
        plan.write_bytes(whole)
    assert cli.main(words) == 0
    for text in ("{", "[]", '{"command": 3, "sha256": {}}'):
        (out / CHECKSUMS).write_text(text, encoding="utf-8")
        capsys_of()
        assert cli.main(words) == 2
        assert "not an empty folder" in commands.one_line(capsys_of().err)


def test_the_files_of_a_model_folder_are_part_of_the_command(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def told(**more):
        return command_of(argparse.Namespace(verb="prune", model=str(model), set=["a=1"], **more))

    first = told(out="a", json=False)
    assert told(out="b", json=True) == first
    (model / ".small.lock").touch()
    assert told() == first, "a lock beside a result in the model's folder"
    (model / "small.resume").mkdir()
    (model / "small.resume" / "x").touch()
    assert told(out=str(model / "small")) == first, "what the command itself makes"
    assert told(out=str(model / "other")) != first
    (model / "config.json").write_text("{ }")
    assert told() != first
    assert told(data="\0", metric="x" * 5000)  # no path, and no failure


def test_only_the_folder_that_the_command_makes_names_it(tmp_path):
    with files.made_by(tmp_path / "out", "abc"):
        for name in ("out", "other"):
            with staged_directory(tmp_path / name, checksums=True) as folder:
                (folder / "x").write_text(name)
    assert [maker_of(tmp_path / name) for name in ("out", "other", "none")] == ["abc", None, None]
    assert hash_tree(tmp_path / "out").keys() == {"x", CHECKSUMS}
    with staged_directory(tmp_path / "later", checksums=True):
        pass
    assert maker_of(tmp_path / "later") is None
