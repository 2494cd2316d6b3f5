"""Paired differences are those of the documents; without documents the page says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from preln.base.errors import InputError
from preln.report.load import load_run
from preln.report.pairing import paired_differences, paired_latex, paired_table, paired_view, signed

HEALED = "heal-reverse-2-lora"


def test_differences_against_a_slow_count(run_folder: Path) -> None:
    run = load_run(run_folder)
    table = paired_differences(run).set_index(["model", "task"])
    dense, healed = run.documents["evaluate-dense"], run.documents[f"evaluate-{HEALED}"]
    tasks = list(dict.fromkeys(dense["task"]))
    gaps = []
    for task in tasks:
        one = dense[dense["task"] == task].set_index("doc_id")["acc"].to_dict()
        other = healed[healed["task"] == task].set_index("doc_id")["acc"].to_dict()
        better = sum(one[i] > other[i] for i in one)
        worse = sum(one[i] < other[i] for i in one)
        row = table.loc[(HEALED, task)]
        assert (row["first_only"], row["second_only"], row["n"]) == (better, worse, len(one))
        gaps.append(np.mean([other[i] - one[i] for i in one]))
        assert row["difference"] == pytest.approx(gaps[-1], abs=1e-12)
        assert row["difference"] == pytest.approx(
            (worse - better) / len(one), abs=1e-12
        )  # outcomes are 0 or 1
        assert row["p"] == pytest.approx(binomtest(better, better + worse, 0.5).pvalue)
        assert row["low"] <= row["difference"] <= row["high"]
    assert table.loc[(HEALED, "mean of tasks"), "difference"] == pytest.approx(np.mean(gaps), abs=1e-12)


def test_a_swap_of_documents_would_be_noticed(run_folder: Path) -> None:
    run = load_run(run_folder)
    shuffled = run.documents[f"evaluate-{HEALED}"].assign(acc=lambda t: t["acc"].to_numpy()[::-1])
    run.documents[f"evaluate-{HEALED}"] = shuffled
    first = paired_differences(load_run(run_folder))
    second = paired_differences(run)
    assert not first["first_only"].equals(second["first_only"])


def test_bold_where_the_interval_excludes_nothing_but_zero(run_folder: Path) -> None:
    table = paired_table(load_run(run_folder))
    beyond = int(((table["low"] > 0) | (table["high"] < 0)).sum())
    assert 0 < beyond < len(table)  # the run holds both kinds
    assert paired_latex(table).count(r"\textbf") == beyond
    rows = paired_view(load_run(run_folder))["rows"]
    assert sum(row["beyond_zero"] for row in rows) == beyond


@pytest.mark.parametrize(
    ("low", "high", "bold"), [(0.0, 0.2, 0), (-0.2, 0.0, 0), (0.01, 0.2, 1), (-0.2, -0.01, 1)]
)
def test_an_interval_that_touches_zero_is_not_bold(
    run_folder: Path, low: float, high: float, bold: int
) -> None:
    one = paired_table(load_run(run_folder)).iloc[:1].assign(low=low, high=high)
    assert paired_latex(one).count(r"\textbf") == bold


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("*", "no outcomes of single documents"),
        ("evaluate-dense", "unpruned"),
        (f"evaluate-{HEALED}", "only"),
    ],
)
def test_what_is_missing_is_said(run_folder: Path, lost: str, words: str) -> None:
    run = load_run(run_folder)
    for step in list(run.documents):
        if lost in ("*", step):
            del run.documents[step]
    with pytest.raises(InputError, match=words):
        paired_differences(run)
    assert paired_table(run).empty
    assert words in paired_view(run)["why"]


def test_other_documents_are_not_paired(run_folder: Path) -> None:
    run = load_run(run_folder)
    run.documents["evaluate-dense"] = run.documents["evaluate-dense"].assign(doc_hash="0")
    assert "another text" in paired_view(run)["why"]


def test_a_run_without_evaluations_has_no_such_table(run_folder: Path) -> None:
    for folder in run_folder.glob("evaluate-*"):
        shutil.rmtree(folder)
    assert paired_view(load_run(run_folder)) is None


def test_damaged_documents_are_refused(run_folder: Path, write_step) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(run_folder / "evaluate-dense")
    rows = pd.DataFrame({"task": ["a"], "doc_id": [0], "acc": [1.0]})
    write_step(
        run_folder, "evaluate-dense", "evaluate", {"results.json": {"tasks": {}}, "documents.parquet": rows}
    )
    with pytest.raises(InputError, match="doc_hash"):
        load_run(run_folder)


def test_signs() -> None:
    assert [signed(value) for value in (0.25, -0.25, -0.0001)] == ["+0.250", "−0.250", "0.000"]
