"""A whole study on a tiny model: kept steps, continued kills, refused damage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from preln import load_model, load_tokens
from preln.base.errors import InputError
from preln.base.files import hash_tree
from preln.experiment import RunStore, dry_run, read_study, run_study
from preln.experiment import steps as work
from preln.experiment.export import export_run
from preln.prune import make_plan, read_plan, score

pytestmark = pytest.mark.integration
VOLATILE = ("step.json", "manifest.json", "checksums.json", "training.parquet", "ledger.json")


def results(run):
    """Hashes of all results but those that hold times."""
    return {
        name: value
        for name, value in hash_tree(run).items()
        if not name.endswith(VOLATILE) and not name.startswith(".") and not name.endswith("result.json")
    }


def numbers(run):
    """The numbers of the result files without their times."""
    timed = ("seconds", "peak_memory_bytes", "forward_seconds_per_token")
    return {
        path.parent.name: {k: v for k, v in json.loads(path.read_text()).items() if k not in timed}
        for path in sorted(run.glob("*/result.json"))
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus):
    return tmp_path_factory.mktemp("undisturbed") / "run"


def test_a_study_runs_keeps_and_reruns_only_what_changed(study_values, write_yaml, undisturbed):
    study_values["theory"] = "quick"
    study_values["prune"]["probe"] = ["reverse-2"]
    study_values["hypotheses"] += [
        {"id": "HYP-TAIL-SHIFT", "statistic": "share_gain", "direction": "above", "threshold": 0.0}
    ]
    study = read_study(write_yaml(study_values))
    first = run_study(study, undisturbed)
    assert first["reused"] == 0
    assert first["failed_claims"] == []
    assert set(first["verdicts"]) == {h["id"] for h in study_values["hypotheses"]}
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert not (undisturbed / ".work" / "prefix").exists()
    before = hash_tree(undisturbed)

    second = run_study(study, undisturbed)
    assert second["ran"] == []
    assert {step["state"] for step in dry_run(study, undisturbed)} == {"kept"}
    assert hash_tree(undisturbed) == before

    study_values["hypotheses"][0]["threshold"] = -0.9
    assert run_study(read_study(write_yaml(study_values)), undisturbed)["ran"] == ["decide"]
    study_values["heal"][1]["steps"] = 5
    states = {
        step["id"]: step["state"] for step in dry_run(read_study(write_yaml(study_values)), undisturbed)
    }
    assert {name for name, state in states.items() if state == "to do"} == {"heal-reverse-2-lora", "decide"}
    third = run_study(read_study(write_yaml(study_values)), undisturbed)
    assert third["ran"] == ["heal-reverse-2-lora", "decide"]
    kept = {p.name.rpartition("-")[0] for p in (undisturbed / ".superseded").iterdir()}
    assert kept == {"decide", "heal-reverse-2-lora"}


def test_a_dry_run_lists_the_steps_in_order_and_writes_nothing(study_values, write_yaml, tmp_path):
    steps = dry_run(read_study(write_yaml(study_values)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert {step["state"] for step in steps} == {"to do"}
    seen = set()
    for step in steps:
        assert seen.issuperset(step["needs"])
        seen.add(step["id"])
    assert steps[-1]["id"] == "decide"


def test_every_verdict_carries_its_rule_and_its_numbers(study_values, write_yaml, tmp_path):
    run_study(read_study(write_yaml(study_values)), tmp_path / "run")
    verdicts = json.loads((tmp_path / "run" / "decide" / "verdicts.json").read_text())["verdicts"]
    for verdict in verdicts:
        assert verdict["status"] in ("supported", "unsupported", "inconclusive")
        assert verdict["statement"]
        assert verdict["value"] is not None
        assert verdict["interval"][0] <= verdict["interval"][1]
        assert verdict["n"] >= 2
        for name in verdict["evidence"]:
            assert (tmp_path / "run" / name).is_file()


def test_an_interrupted_run_continues_to_the_same_results(study_values, write_yaml, tmp_path, monkeypatch):
    study = read_study(write_yaml(study_values))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_study(study, whole)
    original = work.perplexity
    calls = []

    def fail_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(work, "perplexity", fail_once)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, broken)
    assert not (broken / "prune-block_influence-2").exists()
    summary = run_study(study, broken)
    assert summary["reused"] == 4
    assert results(broken) == results(whole)
    assert numbers(broken) == numbers(whole)


def test_a_run_killed_while_healing_continues_from_its_checkpoint(study_values, write_yaml, tmp_path):
    study_values["heal"][0]["steps"] = 60
    study_values["heal"][0]["models"] = ["reverse-2"]
    path = write_yaml(study_values)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-m", "preln.cli", "run", str(path), "--out", str(broken)]
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    deadline = time.monotonic() + 240
    checkpoints = broken / ".work"
    while time.monotonic() < deadline and child.poll() is None:
        if len(list(checkpoints.glob("heal-reverse-2-partial-3-*/training/*"))) >= 1:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (broken / "heal-reverse-2-partial-3").exists()
    assert list(checkpoints.glob("heal-reverse-2-partial-3-*/training/*"))
    study = read_study(path)
    run_study(study, broken)
    run_study(study, whole)
    assert results(broken) == results(whole)
    assert numbers(broken) == numbers(whole)
    history = pd.read_parquet(broken / "heal-reverse-2-partial-3" / "training.parquet")
    expected = pd.read_parquet(whole / "heal-reverse-2-partial-3" / "training.parquet")
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected.drop(columns="seconds"))


def test_a_changed_result_is_named_and_never_used(study_values, write_yaml, tmp_path):
    study = read_study(write_yaml(study_values))
    run_study(study, tmp_path / "run")
    path = tmp_path / "run" / "score" / "scores.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"scores\.parquet: was changed"):
        run_study(study, tmp_path / "run")
    path.unlink()
    with pytest.raises(InputError, match=r"scores\.parquet: is missing"):
        run_study(study, tmp_path / "run")


def test_foreign_folders_and_unknown_models_are_refused_before_anything_is_written(
    study_values, write_yaml, tmp_path
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        run_study(read_study(write_yaml(study_values)), tmp_path / "full")
    study_values["model"] = "tiny:nothing"
    with pytest.raises(InputError, match="no tiny model"):
        run_study(read_study(write_yaml(study_values)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_two_runs_in_one_folder_are_refused(study_values, write_yaml, tmp_path):
    study = read_study(write_yaml(study_values))
    with (
        RunStore(tmp_path / "run").locked(),
        pytest.raises(InputError, match="another run is writing here"),
    ):
        run_study(study, tmp_path / "run")


def test_a_run_of_another_study_is_refused(study_values, write_yaml, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"study": "other"}))
    with pytest.raises(InputError, match="holds a run of 'other'"):
        run_study(read_study(write_yaml(study_values)), tmp_path / "run")


def test_the_shipped_study_is_well_formed():
    from pathlib import Path

    path = Path(__file__).parents[2] / "experiments" / "quickstart.yaml"
    study = read_study(path)
    assert yaml.safe_load(path.read_text())["name"] == study.name == "quickstart"
    wanted = "ATTEN-HIDDEN ATTEN-PARAM SIGMA B-LT1 PREDICTS REVERSE-RAW REVERSE-HEALED LAST PARTIAL"
    assert {h.id for h in study.hypotheses} == {f"HYP-{name}" for name in wanted.split()}


def test_an_export_leaves_weights_out_and_says_so(study_values, write_yaml, tmp_path):
    run, out = tmp_path / "run", tmp_path / "results"
    run_study(read_study(write_yaml(study_values)), run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["git"]["dirty"] = True
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="uncommitted code"):
        export_run(run, out)
    assert not out.exists()
    manifest["git"]["dirty"] = False
    (run / "manifest.json").write_text(json.dumps(manifest))
    export_run(run, out)
    assert not list(out.rglob("*.safetensors"))
    record = RunStore(out).verified("heal-reverse-2-lora")
    assert set(record["left_out"]) == {"weights.safetensors"}
    assert (out / "decide" / "verdicts.json").read_bytes() == (run / "decide" / "verdicts.json").read_bytes()
    export_run(run, out)


def test_a_theorem_that_fails_is_named_and_turns_the_exit_code(
    monkeypatch, capsys, tmp_path, study_values, write_yaml
):
    from preln import cli, experiment
    from preln.experiment.run import failed_claims

    evidence = [{"kind": "smt", "outcome": "pass"}, {"kind": "property", "outcome": "fail"}]
    ledger = {
        "claims": [{"id": "RMS-NORM", "evidence": evidence}, {"id": "SIM-BI", "evidence": evidence[:1]}]
    }
    assert failed_claims(ledger) == ["RMS-NORM"]
    summary = {"verdicts": {}, "run": "x", "failed_claims": failed_claims(ledger)}
    monkeypatch.setattr(experiment, "run_study", lambda *_: summary)
    assert cli.main(["run", str(write_yaml(study_values)), "--out", str(tmp_path / "run")]) == 1
    assert "RMS-NORM" in capsys.readouterr().err


def test_a_window_is_scored_for_the_size_that_goes(study_values, write_yaml, tmp_path):
    study_values["prune"] = {"metrics": ["angular", "sleb"], "drop": [1, 3]}
    study_values |= {"heal": [], "hypotheses": study_values["hypotheses"][:1]}
    study_values.pop("tasks", None)
    run = run_study(read_study(write_yaml(study_values)), tmp_path / "run")["run"]
    model, tokenizer = load_model("tiny:llama:6")
    asked = study_values["data"]["calibration"]
    asked = {name: value for name, value in asked.items() if name != "source"}
    batch = load_tokens(study_values["data"]["calibration"]["source"], tokenizer, **asked)
    for metric in ("angular", "sleb"):
        for drop in (1, 3):
            plan = read_plan(Path(run) / f"prune-{metric}-{drop}" / "plan.yaml")
            expected = make_plan(score(model, batch, [metric], size=drop), metric, drop=drop)
            assert plan.drop == expected.drop and plan.scores == pytest.approx(expected.scores)
