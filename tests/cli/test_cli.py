"""The command line: exit codes, one-line errors, nothing half-written, JSON on the last line."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch

from preln.cli import main

pytestmark = pytest.mark.integration
WINDOW = ("--sequences", "2", "--length", "16")


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [
        {"text": f"block {i} reads what the stream holds and writes its update {i * i}. " * 6}
        for i in range(80)
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "nonsense", "--layers", "1"], "nonsense: unknown here"),
        (["prune", "./nowhere", "--layers", "1"], "no such file or folder"),
        (["prune", "tiny:llama", "--metric", "reverse", "--drop", "4"], "--drop 4 of 4 blocks"),
        (["prune", "tiny:llama:30", "--metric", "reverse", "--drop", "30"], "--drop 30 of 30 blocks"),
        (["prune", "tiny:llama", "--metric", "reverse", "--drop", "0"], "--drop 0 of 4 blocks"),
        (["prune", "tiny:llama", "--metric", "guess", "--drop", "1"], "guess"),
        (["prune", "tiny:llama", "--metric", "reverse"], "--drop is missing"),
        (["prune", "tiny:llama", "--layers", "4"], "block 4 is out of range"),
        (["prune", "tiny:llama", "--layers", "x"], "neither a block nor a range"),
        (["prune", "tiny:llama", "--layers", "0-4"], "all 4 blocks"),
        (["prune", "tiny:llama"], "one way"),
        (["prune", "tiny:llama", "--layers", "1", "--plan", "p.yaml"], "one way"),
        (["prune", "tiny:llama", "--plan", "nowhere.yaml"], "no such file"),
        (["prune", "tiny:llama", "--layers", "3", "--protect", "uidl"], "protected"),
        (["prune", "tiny:llama", "--layers", "1", "--device", "nowhere"], "--device nowhere"),
        (["probe", "tiny:opt-post", "--measures", "norm_sigma", *WINDOW], "post-ln"),
        (["probe", "tiny:llama", "--measures", "guess", *WINDOW], "guess"),
        (["probe", "tiny:llama", "--attention", "nonsense", *WINDOW], "nonsense"),
        (["probe", "tiny:llama", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["score", "tiny:llama", "--metrics", "reverse,guess", *WINDOW], "guess"),
        (["heal", "tiny:llama", "--recipe", "guess"], "guess"),
        (["heal", "tiny:llama:2", "--recipe", "partial-3", *WINDOW], "partial-3"),
        (["evaluate", "tiny:llama"], "nothing to evaluate"),
        (["run", "nowhere.yaml"], "no such file"),
        (["report", "nowhere"], "nowhere"),
        (["verify", "NO-SUCH-CLAIM"], "NO-SUCH-CLAIM"),
    ],
)
def test_bad_input_exits_with_two_one_line_and_no_file(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["prune", "tiny:llama", "--drop", "x"], ["guess"], [], ["heal", "tiny:llama"]]
)
def test_bad_options_exit_with_two_and_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_nan_weights_are_refused(tmp_path, capsys):
    import torch

    from preln.models import tiny_model, tiny_tokenizer

    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    arguments = ["prune", str(tmp_path / "broken"), "--layers", "1", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    for verb in (
        ["prune", "nonsense", "--layers", "1"],
        ["probe", "nonsense"],
        ["heal", "nonsense", "--recipe", "head"],
    ):
        assert main([*verb, "--out", str(tmp_path)]) == 2
        assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_prune_writes_what_plain_transformers_loads(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "small"
    assert main(["prune", "tiny:llama:6", "--layers", "0,2-4", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    assert "removes 3 of 6 blocks, counted from 0: 0, 2, 3; keeps 1, 4, 5" in printed
    assert last_json(printed) == {"out": str(out), "drop": [0, 2, 3], "keep": [1, 4, 5]}
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
    again = tmp_path / "again"
    assert main(["prune", "tiny:llama:6", "--plan", str(out / "plan.yaml"), "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("measures", ["stream", "updates", "gradients", "norms", "jacobians", "lens"])
def test_every_group_of_measures_alone_is_printed_and_has_numbers(measures, tmp_path, corpus, capsys):
    import pandas as pd

    data, out = ["--data", corpus, *WINDOW], tmp_path / "p"
    assert main(["probe", "tiny:llama:2", *data, "--measures", measures, "--out", str(out)]) == 0
    assert capsys.readouterr().out
    for name, columns in (("layers", ["layer", "value", "low", "high", "n"]), ("sequences", ["value"])):
        table = pd.read_parquet(out / f"{name}.parquet")
        kinds = {column: table[column].dtype.kind for column in columns}
        assert set(kinds.values()) <= {"i", "f"} or not len(table), kinds


def test_probe_and_score_write_their_tables(tmp_path, corpus, capsys):
    import pandas as pd

    data = ["--data", corpus, *WINDOW]
    assert main(["probe", "tiny:gpt2", *data, "--out", str(tmp_path / "p"), "--json"]) == 0
    assert last_json(capsys.readouterr().out)["placement"] == "pre-ln"
    layers = pd.read_parquet(tmp_path / "p" / "layers.parquet")
    assert {"measure", "layer", "statistic", "value", "n", "site"} <= set(layers.columns)
    assert {"start", "size", "angular_distance", "angular_distance_last_token"} <= set(
        pd.read_parquet(tmp_path / "p" / "pairs.parquet").columns
    )
    assert main(["score", "tiny:gpt2", *data, "--metrics", "all", "--out", str(tmp_path / "s")]) == 0
    scores = pd.read_parquet(tmp_path / "s" / "scores.parquet")
    assert sorted(scores.columns) == ["layer", "metric", "rank", "score"]
    assert (tmp_path / "s" / "manifest.json").is_file()


def test_probe_answers_what_the_bounds_ask(tmp_path, corpus, capsys):
    import pandas as pd

    out, window = tmp_path / "p", ["--sequences", "4", "--length", "6", "--batch-size", "1"]
    command = ["probe", "tiny:llama:2", "--data", corpus, *window, "--measures", "all"]
    assert main([*command, "--jacobian-sequences", "2", "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr().out
    said = last_json(printed)["answers"]
    assert set(said) == {"sigma_above_one", "variance_le_one", "stack_overestimate", "product_overestimate"}
    assert said["stack_overestimate"] >= said["product_overestimate"] >= 0
    for words in ("sigma(G) > 1", "variance <= 1", "the product of block bounds is 10^", "lens loss"):
        assert words in printed, words
    layers = pd.read_parquet(out / "layers.parquet").set_index("measure")
    assert set(layers.loc[["stack_sigma", "block_sigma"], "n"]) == {2}
    assert set(layers.loc["lens_loss", "n"]) == {4}
    assert set(layers.loc["block_sigma", "attn_implementation"]) == {"sdpa_math"}
    assert not (tmp_path / "p.resume").exists()


def test_heal_and_evaluate_in_a_row(tmp_path, corpus, capsys):
    small, healed = str(tmp_path / "small"), str(tmp_path / "healed")
    data = ["--data", corpus, "--sequences", "16", "--length", "32"]
    assert main(["prune", "tiny:llama:6", "--layers", "4,5", "--out", small]) == 0
    heal = ["heal", small, "--recipe", "partial-1", *data, "--steps", "8", "--validation-sequences", "2"]
    assert main([*heal, "--learning-rate", "1e-3", "--out", healed, "--json"]) == 0
    summary = last_json(capsys.readouterr().out)
    assert summary["loss_after"] < summary["loss_before"]
    evaluate = ["evaluate", healed, "--data", corpus, *WINDOW, "--out", str(tmp_path / "e"), "--json"]
    assert main(evaluate) == 0
    assert last_json(capsys.readouterr().out)["perplexity"]["tokens"] == 30
    assert (tmp_path / "e" / "results.json").is_file()


def test_every_level_has_help_and_a_version():
    for verb in (
        "",
        "verify",
        "probe",
        "score",
        "prune",
        "heal",
        "evaluate",
        "run",
        "estimate",
        "report",
        "sources",
    ):
        for flag, expected in (("--help", "usage: preln"), ("--version", "preln 0.")):
            command = [sys.executable, "-m", "preln.cli", *([verb] if verb else []), flag]
            answer = subprocess.run(
                command, capture_output=True, text=True, check=False, env=dict(os.environ)
            )
            assert answer.returncode == 0, answer.stderr
            assert expected in answer.stdout


def test_sources_lists_models_and_data(capsys):
    assert main(["sources", "--json"]) == 0
    found = last_json(capsys.readouterr().out)
    assert any(row["name"] == "smollm2-135m" for row in found["models"])
    assert any(row["name"] == "docstrings" for row in found["data"])


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    import preln.cli as cli

    def interrupt(_arguments):
        raise KeyboardInterrupt

    interrupt.__name__ = "sources"
    monkeypatch.setattr(cli, "sources", interrupt)
    assert main(["sources"]) == 130
    assert "continues" in capsys.readouterr().err


def test_evaluate_beside_the_unpruned_model(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.setattr(
        "preln.evaluate.sentences.load_sentence_encoder",
        lambda: types.SimpleNamespace(embed=lambda texts: torch.ones(len(texts), 2)),
    )
    out = str(tmp_path / "e")
    told = ["--stride", "8", "--positions", "--timed", "--reference", "tiny:llama:5", "--new-tokens", "3"]
    assert main(["evaluate", "tiny:llama", "--data", corpus, *WINDOW, *told, "--out", out, "--json"]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["strided"]["stride"] == 8
    assert {row["phase"] for row in said["speedup"]} == {"prefill", "decode"}
    assert said["speedup"][0]["removed"] == pytest.approx(0.2)
    assert "corpus_bleu" in {row["measure"] for row in said["generation"]}
    assert len(said["positions"]) > 1
    assert main(["evaluate", "tiny:llama", "--new-tokens", "3"]) == 2
    assert main(["evaluate", "tiny:llama", "--tasks", "piqa", "--against", str(tmp_path)]) == 2
