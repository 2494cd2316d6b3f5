"""Odd words, names, numbers and files, each found by trying to break the program: one line, no traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from preln import cli
from preln.base.errors import InputError
from preln.base.files import hash_tree
from preln.base.yaml_files import read_yaml
from preln.experiment import read_study

pytestmark = pytest.mark.integration
PRUNE = ["prune", "tiny:llama:3", "--layers", "1"]
ODD_YAML = {
    "month 13": "a: 2024-13-45",
    "no number": "a: 0x_",
    "5000 digits": f"a: {'9' * 5000}",
    "64 bits": f"a: {2**63}",
    "no int": "a: !!int x",
    "no float": "a: !!float x",
    "no bool": "a: !!bool x",
    "no time": "a: !!timestamp x",
    "object": "a: !!python/object/apply:os.system [true]",
    "nested": "a: " + "[" * 3000,
    "nested very deep": "a: " + "[" * 300_000,  # told at its fifty-first level
    "blocks nested": "".join(f"{' ' * i}a:\n" for i in range(2000)),
    "closed and nested": "a: " + "[" * 60 + "]" * 60,
    "itself": "a: &a [*a]",
    "bomb": "a0: &a0 [x]\n"
    + "\n".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9)),
    "bomb of merges": "a0: &a0 {"
    + ", ".join(f"k{i}: {i}" for i in range(10))
    + "}\n"
    + "\n".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}" for i in range(9)),
    "latin-1": b"a: \xe9",
    "control": "a: \x07",
}


def refused(words, capsys, culprit=""):
    """The one line of a command that ends with 2."""
    capsys.readouterr()
    try:
        code = cli.main(words)
    except SystemExit as stop:  # of the parser
        code = stop.code
    errors = capsys.readouterr().err
    assert code == 2, errors
    lines = [line for line in errors.strip().splitlines() if not line.startswith("[")]  # a study's progress
    assert len(lines) == 1 and "Traceback" not in errors, errors
    assert culprit in lines[0], lines[0]
    return lines[0]


@pytest.mark.parametrize("kind", ODD_YAML)
def test_odd_yaml_is_refused_wherever_it_is_read(kind, tmp_path, capsys):
    text = ODD_YAML[kind]
    for name in ("odd.yaml", "plan.yaml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    path = tmp_path / "odd.yaml"
    with pytest.raises(InputError, match=r"odd\.yaml: "):
        read_yaml(path)
    refused(["prune", "tiny:llama:3", "--plan", str(path), "--out", str(tmp_path / "o")], capsys, "odd.yaml")
    refused(["run", str(path), "--out", str(tmp_path / "o")], capsys, "odd.yaml")
    refused(["estimate", str(path)], capsys, "odd.yaml")
    refused(["heal", str(tmp_path), "--recipe", "head", "--out", str(tmp_path / "o")], capsys, "plan.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd.yaml", "plan.yaml"]


def test_yaml_with_anchors_that_repeat_little_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, z: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["c"] == {"x": 1, "y": [1, 2], "z": 3}


@pytest.mark.parametrize("text", ['{"text": "a", "n": ' + "9" * 5000 + "}", '{"text": ' + "[" * 100_000])
def test_odd_rows_are_named_by_their_line(text, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + text + "\n")
    for words in (["probe"], ["heal", "--recipe", "head", "--rows", "5", "--out", str(tmp_path / "o")]):
        line = refused([words[0], "tiny:llama:2", *words[1:], "--data", str(path)], capsys)
        assert "rows.jsonl: line 2" in line
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["manifest.json", "score/step.json"])
@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{", "9" * 5000, "[" * 100_000])
def test_odd_files_of_a_run_are_named(name, text, prepared, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(prepared / "run", run)
    (run / name).write_text(text)
    words = ["run", str(prepared / "study.yaml"), "--out", str(run)]
    before = hash_tree(run)
    for line in (refused([*words, "--dry-run"], capsys), refused(words, capsys)):
        assert str(run / name) in line
    assert hash_tree(run) == before, "something was written into a run that is not whole"


@pytest.mark.parametrize("text", ["{}", '{"schema_version": 99}', '{"inputs_hash": 3, "files": []}'])
def test_records_that_are_none_are_named(text, prepared, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(prepared / "run", run)
    (run / "probe" / "step.json").write_text(text)
    before = hash_tree(run)
    line = refused(["run", str(prepared / "study.yaml"), "--out", str(run)], capsys)
    assert "probe/step.json: is no record" in line and f"remove {run / 'probe'}" in line
    assert hash_tree(run) == before


def test_a_configuration_that_is_not_utf_8_is_written_anew(prepared, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(prepared / "run", run)
    whole = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(b"\xff" + whole)
    assert cli.main(["run", str(prepared / "study.yaml"), "--out", str(run)]) == 0
    assert (run / "config.yaml").read_bytes() == whole


LONG = "9" * 5000
WORDS = {
    "seed": [*PRUNE, "--seed", "9" * 20],
    "seed of 2^32": [*PRUNE, "--seed", str(2**32)],
    "device": [*PRUNE, "--device", "mps"],
    "meta": [*PRUNE, "--device", "meta"],
    "attention": ["probe", "tiny:llama:3", "--attention", "flash_attention_2"],
    "superscript": ["prune", "tiny:llama:²", "--layers", "1"],
    "blocks": ["prune", f"tiny:llama:{LONG}", "--layers", "1"],
    "many blocks": ["prune", "tiny:llama:1001", "--layers", "1"],
    "layers": ["prune", "tiny:llama:3", "--layers", LONG],
    "range": ["prune", "tiny:llama:3", "--layers", f"0-{LONG}"],
    "dropped": ["heal", "tiny:llama:3", "--recipe", "head", "--dropped", LONG],
    "at a time": ["score", "tiny:llama:3", "--metrics", f"reverse@{LONG}"],
    "windows": ["probe", "tiny:llama:3", "--sequences", "9" * 20],
    "limit": ["evaluate", "tiny:llama:3", "--tasks", "piqa", "--limit", str(10**9 + 1)],
    "steps": ["heal", "tiny:llama:3", "--recipe", "head", "--steps", "9" * 20],
    "seeds": ["heal", "tiny:llama:3", "--recipe", "head", "--sweep", "steps=1", "--seeds", "9" * 20],
    "budget": ["heal", "tiny:llama:3", "--recipe", "head", "--cache-budget", "1e300"],
    "rank": ["heal", "tiny:llama:3", "--recipe", "lora", "--set", f"rank={'9' * 20}"],
    "grid": ["heal", "tiny:llama:3", "--recipe", "lora", "--sweep", f"rank={LONG}"],
    "out": [*PRUNE, "--out", "ou\udcff"],
    "model": ["prune", "mo\udcff", "--layers", "1"],
}


@pytest.mark.parametrize("kind", WORDS)
def test_odd_words_are_refused_at_once(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = WORDS[kind]
    assert refused(words if "--out" in words else [*words, "--out", "o"], capsys).startswith("preln")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_more_blocks_than_there_can_be_is_refused(tmp_path, capsys):
    for number in (99_999_999_999, 100_001):
        (tmp_path / "plan.yaml").write_text(f"num_blocks: {number}\ndrop: [1]\nprotect: finercut\n")
        words = ["prune", "tiny:llama:3", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "o")]
        assert "plan.yaml: num_blocks: Input should be less than or equal to 100000" in refused(words, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_study_whose_seed_no_generator_takes_is_refused(prepared, tmp_path):
    values = yaml.safe_load((prepared / "study.yaml").read_text())
    for place in (values, values["data"]["calibration"]):
        for number in (-1, 2**32):
            former, place["seed"] = place.get("seed", 0), number
            (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
            with pytest.raises(InputError, match="seed"):
                read_study(tmp_path / "study.yaml")
            place["seed"] = former


def test_what_the_command_line_does_not_say_the_study_says(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((prepared / "study.yaml").read_text()) | {"seed": 7, "heal": [], "hypotheses": []}
    (tmp_path / "device").write_text(yaml.safe_dump(values))
    for out, more, seed in (("seed", [], 7), ("dtype", ["--see", "5"], 5), ("x", ["--seed=6"], 6)):
        assert cli.main(["run", "device", "--out", out, *more]) == 0
        assert yaml.safe_load((tmp_path / out / "config.yaml").read_text())["seed"] == seed


@pytest.mark.parametrize("out", ["x/.", "./x", "x/", "a/../x", "link", "broken"])
def test_any_name_of_a_free_folder_will_do(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    (tmp_path / "broken").symlink_to("x")
    words = [*PRUNE, "--out", out, "--json"]
    for kept in (False, True):
        assert cli.main(words) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]).get("kept", False) is kept
    made = "real" if out == "link" else "x"
    assert (tmp_path / made / "plan.yaml").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link", "broken", made}


def test_an_empty_folder_is_filled_from_within(tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main([*PRUNE, "--out", "."]) == 0
    assert (tmp_path / "here" / "plan.yaml").is_file() and [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_link_to_itself_is_no_folder(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: is a link to itself" in refused([*PRUNE, "--out", str(tmp_path / "loop")], capsys)
    assert (tmp_path / "loop").is_symlink() and [p.name for p in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_dtypes_are_pruned_and_load_again(dtype, tmp_path, capsys):
    assert cli.main([*PRUNE, "--dtype", dtype, "--out", str(tmp_path / "o")]) == 0
    assert json.loads((tmp_path / "o" / "config.json").read_text())["dtype"] == dtype


def test_a_ledger_that_is_not_run_is_not_announced(tmp_path, capsys):
    (tmp_path / "claims.yaml").write_text("x")
    line = refused(["verify", "--ledger", str(tmp_path / "claims.yaml")], capsys)  # the only one on stderr
    assert "claims.yaml: no such Python file" in line and "run now" not in line


def test_a_folder_of_data_that_is_not_json_is_told_in_one_line(tmp_path, capsys):
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("no json\n")
    line = refused(["probe", "tiny:llama:2", "--data", str(folder)], capsys)
    assert f"{folder}: the data set cannot be loaded" in line


def test_a_folder_of_rows_that_may_not_be_read_is_not_called_unwritable(tmp_path, capsys, monkeypatch):
    honest = Path.rglob

    def denied(folder, pattern):
        if folder == tmp_path:
            raise PermissionError(13, "Permission denied", f"{folder}/private")
        return honest(folder, pattern)

    monkeypatch.setattr(Path, "rglob", denied)
    words = ["heal", "tiny:llama:2", "--recipe", "head", "--rows", "5", "--data", str(tmp_path)]
    line = refused(
        [*words, "--out", str(tmp_path / "o")], capsys, "private: cannot be read (Permission denied)"
    )
    assert "written" not in line


def test_halves_one_at_a_time_have_their_damage_measured(prepared, tmp_path, capsys):
    data = ["--data", str(prepared / "text.jsonl"), "--sequences", "4", "--length", "16"]
    words = ["score", "tiny:llama:4", *data, "--metrics", "llm_drop_attention@1", "--damage", "1,2", "--json"]
    assert cli.main(words) == 0
    damage = json.loads(capsys.readouterr().out.splitlines()[-1])["damage"]
    assert {row["drop"] for row in damage if row["metric"] == "llm_drop_attention@1"} == {1, 2}


@pytest.mark.parametrize("what", ["below", "configuration", "source", "benchmarks", "beside"])
def test_what_a_command_reads_decides_whether_its_result_is_kept(
    what, prepared, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "sub"
    folder.mkdir(parents=True)
    text = folder / "train.jsonl"
    shutil.copy(prepared / "text.jsonl", text)
    out = "reverse" if what == "beside" else "o"  # a name that is also a word of the command
    words = ["prune", "tiny:llama:3", "--metric", "reverse", "--drop", "1", "--out", out]
    if what == "below":
        words = ["heal", "tiny:llama:3", "--recipe", "head", "--rows", "9", "--steps", "1", "--data", "data"]
        words += ["--batch-size", "2", "--validation-sequences", "2", "--out", out]
    elif what == "configuration":
        words = [*words, "--data", "data:default"]
    elif what == "benchmarks":
        monkeypatch.setenv("PRELN_DATA", str(tmp_path / "data"))
    elif what == "source":
        words = ["evaluate", "tiny:llama:3", "--data", str(prepared / "text.jsonl"), "--source", "data"]
        words += ["--sequences", "2", "--length", "16", "--out", out]
    for _ in range(2):
        assert cli.main(words) == 0
    assert "kept" in capsys.readouterr().err
    os.utime(text, ns=(1, 1))
    if what == "beside":  # it does not read that
        assert cli.main(words) == 0
    else:
        refused(words, capsys, "not an empty folder")
