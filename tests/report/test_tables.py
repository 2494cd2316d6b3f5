"""Tables derived from a run, and what they look like as CSV and LaTeX."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from preln.report.load import load_run
from preln.report.run_tables import run_tables
from preln.report.summary import agreement, outcomes, ranges, spearman, tasks, verdict_table
from preln.report.tables import latex_escape, number


def test_outcomes_order_and_numbers(run_folder: Path) -> None:
    run = load_run(run_folder)
    table = outcomes(run)
    assert list(table["stage"][:5]) == ["dense", "pruned", "healed", "healed", "healed"]
    raw = table[table["stage"] == "pruned"]
    assert raw["loss"].is_monotonic_increasing
    assert np.allclose(table["perplexity"], np.exp(table["loss"]))
    assert (table["dense_loss"] == 2.86).all()
    lora = table[(table["metric"] == "reverse") & (table["recipe"] == "lora")].iloc[0]
    heal = next(heal for heal in run.heals if heal["id"] == "heal-reverse-2-lora")
    assert lora["loss"] == heal["loss_after"]
    assert lora["trainable_parameters"] == heal["trainable_parameters"]


def test_dense_loss_falls_back_on_damage(run_folder: Path) -> None:
    for folder in run_folder.glob("prune-*"):
        (folder / "step.json").unlink()
    table = outcomes(load_run(run_folder))
    assert table.loc[table["stage"] == "dense", "loss"].iloc[0] == pytest.approx(2.86)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_against_scipy(seed: int) -> None:
    noise = np.random.default_rng(seed)
    a, b = noise.integers(0, 6, 20), noise.normal(size=20)
    assert spearman(pd.Series(a), pd.Series(b)) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert math.isnan(spearman(pd.Series([1.0, 1.0]), pd.Series([1.0, 2.0])))


def test_agreement_ranks_metrics(run_folder: Path) -> None:
    run = load_run(run_folder)
    perfect = run.damage[["layer"]].assign(metric="oracle", score=run.damage["delta"], rank=0)
    opposite = perfect.assign(metric="opposite", score=-run.damage["delta"])
    table = agreement(pd.concat([run.scores, perfect, opposite]), run.damage)
    assert table.iloc[0]["metric"] == "oracle"
    assert table.iloc[0]["rank_correlation"] == pytest.approx(1.0)
    assert table.iloc[-1]["rank_correlation"] == pytest.approx(-1.0)


def test_ranges() -> None:
    assert ranges([22, 3, 20, 21, 7, 8]) == "3, 7–8, 20–22"
    assert ranges([]) == ""


def test_latex_escape_leaves_no_command() -> None:
    nasty = r"\input{/etc/passwd} & 50% $x$ a_b #1 {y} ~ ^ <σ²≤1>"
    text = latex_escape(nasty + "\nnext")
    assert r"\input" not in text
    assert "\n" not in text
    for piece in (r"\textbackslash{}input", r"\&", r"\%", r"\$x\$", r"a\_b", r"\#1", r"$\sigma$", r"$\leq$"):
        assert piece in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "–"), (math.nan, "–"), (0.0, "0"), (8, "8"), (1234567, "1,234,567"), (1443.3, "1,443")),
        *((-0.97, "-0.97"), (0.123456, "0.1235"), (1e-5, "1e-5"), (math.inf, "∞"), (True, "True")),
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value) == text


def test_a_group_without_a_standard_error_gets_that_of_a_share(run_folder: Path) -> None:
    documents = np.array([1.0, 1.0, *[0.0] * 6])
    numbers = {"mmlu": {"acc": 0.25, "acc_stderr": None, "n": 8}, "one": {"acc": 1.0, "n": 1}}
    numbers["told"] = {"acc": 0.25, "acc_stderr": 0.5, "n": 8}
    run = replace(load_run(run_folder), evaluations=({"id": "evaluate-dense", "tasks": numbers},))
    found = tasks(run).set_index("task")["acc_stderr"]
    assert found["mmlu"] == pytest.approx(documents.std(ddof=1) / math.sqrt(8))
    assert math.isnan(found["one"]) and found["told"] == 0.5


def test_files_of_a_run(run_folder: Path, hostile: str) -> None:
    run = load_run(run_folder)
    files = run_tables(run)
    names = ("verdicts", "outcomes", "tasks", "paired", "costs")
    assert set(files) == {f"{t}.{e}" for t in names for e in ("csv", "tex")}
    back = pd.read_csv(io.StringIO(files["tasks.csv"]))
    pd.testing.assert_frame_equal(back, tasks(run), check_dtype=False)
    assert hostile in set(pd.read_csv(io.StringIO(files["verdicts.csv"]))["note"])
    for name, text in files.items():
        if name.endswith(".tex"):
            assert text.startswith(r"\begin{tabular}")
            assert r"\end{document}" not in text
            body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
            header = text.split(r"\toprule")[1].split(r"\midrule")[0]
            columns = header.replace(r"\&", "").count("&")
            for row in body.strip().split("\n"):
                assert row.replace(r"\&", "").count("&") == columns


def test_latex_marks_the_best_in_bold(run_folder: Path) -> None:
    run = load_run(run_folder)
    files, table = run_tables(run), outcomes(run)
    for stage in ("pruned", "healed"):
        best = table.loc[table["stage"] == stage, "loss"].min()
        assert rf"\textbf{{{number(best)}" in files["outcomes.tex"]
    assert files["outcomes.tex"].count(r"\textbf") == 2
    assert files["tasks.tex"].count(r"\textbf") == 4  # one a task
    assert r"\textbf{0.680} $\pm$ 0.040" in files["tasks.tex"]


def test_verdicts_without_a_value_keep_their_row(run_folder: Path) -> None:
    table = verdict_table(load_run(run_folder)).set_index("id")
    assert math.isnan(table.loc["HYP-PARTIAL", "value"])
    assert math.isnan(table.loc["HYP-PARTIAL", "low"])
    assert table.loc["HYP-ATTEN-HIDDEN", "high"] == -0.9
