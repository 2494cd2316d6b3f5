"""The write-up stands on committed results: a typed number, an unborne claim or a missing run stops it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from preln.report.paper import check_log, check_source, generate, main, older_statements, read_index
from preln.report.paper.check import Index
from preln.report.paper.figures import FIGURES, damage_ranks
from preln.report.paper.results import OTHERS, PROBE, SCORES, STUDY, rate, read_results, tex
from preln.report.paper.tables import TABLES
from preln.report.paper.values import values
from preln.report.style import render

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
PUBLISHED = ROOT / "experiments" / "published" / "reassessing.yaml"


@pytest.fixture(scope="module")
def results():
    return read_results(RESULTS, PUBLISHED)


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> Path:
    """A copy of the paper with everything generated."""
    folder = tmp_path_factory.mktemp("tex") / "paper"
    folder.mkdir()
    for name in ("main.tex", "preamble.tex"):
        (folder / name).write_bytes((ROOT / "paper" / name).read_bytes())
    generate(folder, RESULTS, PUBLISHED)
    return folder


@pytest.fixture(scope="module")
def index(paper) -> Index:
    return read_index(paper / "generated")


@pytest.fixture
def said(tmp_path, index):
    """Problems of a text that holds nothing but a passage, on its third line."""

    def check(passage: str) -> list[str]:
        source = tmp_path / "text.tex"
        source.write_text(f"\\begin{{document}}\n\n{passage}\n\\end{{document}}\n", encoding="utf-8")
        return check_source(source, index)

    return check


def linked(tmp_path: Path, *, without: str = "") -> Path:
    """The committed results by link, less one of them."""
    root = tmp_path / "results"
    root.mkdir()
    for name in (STUDY, PROBE, SCORES, *OTHERS):
        if name != without:
            (root / name).symlink_to(RESULTS / name)
    return root


def test_the_paper_passes(paper):
    assert main(["check", str(paper / "main.tex")]) == 0


def test_the_paper_uses_every_figure_and_table(paper):
    text = (paper / "main.tex").read_text(encoding="utf-8")
    for place in [*(f"figures/{n}.pdf" for n in FIGURES), *(f"tables/{n}.tex" for n in TABLES)]:
        assert f"{{generated/{place}}}" in text, place


@pytest.mark.parametrize(
    ("passage", "number"),
    [
        ("The loss rose by 12.3 \\%.", "12.3 \\%"),
        ("The loss rose by 7 nats.", "7"),
        ("On 1,024 tokens.", "1,024"),
        ("It rose by $12.3\\,\\%$.", "12.3"),
        ("It rose by $3$ nats.", "3"),
        ("It rose by $\\approx 3\\,\\%$.", "3"),
        ("A factor $r\\approx 3$.", "3"),
        ("A factor $r=3$.", "3"),
        ("A factor of $r = 2.5$.", "2.5"),
        ("A share $p = .3$.", "3"),
        ("A share of $p=4\\,\\%$.", "4"),
        ("About $10^{4}$ times, or $c\\cdot 10^3$.", "10"),
        ("A list $x=1\\,2\\,4$.", "2"),
        ("$x\\text{ in 3 of 4 runs}$", "3"),
        ("In seventeen runs.", "seventeen"),
        ("\\newcommand{\\gain}{4.2}", "4.2"),
        ("\\begin{tabular}{lr} reverse & 15.9 \\\\ \\end{tabular}", "15.9"),
        ("\\val{probe/loss}1", "1"),
        ("SmolLM2-135M has 30 blocks.", "30"),
        ("\\begin{equation} q = 17 \\end{equation}", "17"),
        ("\\textbf{3.14}", "3.14"),
        ("\\citep[rose by 12.3]{lu2024}", "12.3"),
        ("\\url{12.3}", "12.3"),
        ("\\setval{probe/loss}{9.99}", "9.99"),
        ("\\claim{RMS-NORM}{12.3}", "12.3"),
        ("\\section{Results on 8 tasks}", "8"),
    ],
)
def test_a_number_typed_by_hand_fails_with_its_line(said, passage, number):
    problems = said(passage)
    assert any(f"text.tex:3: '{number}'" in p.replace("\\\\", "\\") for p in problems), problems


@pytest.mark.parametrize(
    "passage",
    [
        "See Table~\\ref{tab:2}, \\citep{lu2024}, \\label{sec:4}.",
        "For $d\\geq 3$, and $d=2$, $\\sigma^2\\geq\\tfrac{1}{4}$, $\\sqrt{2d}$, $|x_0|^2$.",
        "SmolLM2-135M in float32, Llama-3.1-8B, partial-3.",
        "\\vspace{3mm}\\setlength{\\tabcolsep}{4.5pt}",
        "nothing % 12.3 in a comment",
        "\\begin{tabular}{@{}p{0.3\\linewidth}r@{}} a & b \\\\[2pt] \\end{tabular}",
        "\\DeclareRobustCommand{\\x}[1]{#1}",
        "\\val{probe/loss} nats, and \\val{level}\\,\\%.",
        "$\\sigma<1$ where $\\sigma^2>1$, and $\\mu=0$.",
        "One, two, three and four blocks.",
    ],
)
def test_what_is_no_result_passes(said, passage):
    assert said(passage) == []


def test_the_example_of_a_typed_number_fails_the_copy(paper, tmp_path, index, capsys):
    lines = (paper / "main.tex").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Three published comparisons"))
    lines.insert(at, "Accuracy falls by 12.3 \\%.")
    copy = paper / "typed.tex"
    copy.write_text("\n".join(lines), encoding="utf-8")
    assert main(["check", str(copy)]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"typed.tex:{at + 1}: '12.3 " in told[0]


@pytest.mark.parametrize(
    ("passage", "told"),
    [
        ("\\val{unknown}", "\\val{unknown}: no result has this key"),
        ("\\claim{CMP-PAPER}", "\\claim{CMP-PAPER}: refuted in the ledger, the text needs proved"),
        ("\\refuted{RMS-NORM}", "\\refuted{RMS-NORM}: proved in the ledger, the text needs refuted"),
        ("\\claim{NO-SUCH}", "\\claim{NO-SUCH}: not in the ledger"),
        ("\\claim{HYP-LAST}", "\\claim{HYP-LAST}: not in the ledger"),
        ("\\hyp{HYP-PLACEMENT}", "\\hyp{HYP-PLACEMENT}: no stored verdict"),
        ("As CMP-LT1 says.", "CMP-LT1: an ID typed by hand"),
        ("\\input{generated/tables/none.tex}", "generated/tables/none.tex: there is no such file"),
    ],
)
def test_what_the_results_do_not_bear_fails(said, passage, told):
    assert any(p.split(":3: ")[1].startswith(told) for p in said(passage)), said(passage)


def test_what_the_ledger_bears_passes(said, index):
    assert said("\\claim{RMS-NORM}, \\refuted{CMP-PAPER}, \\hyp{HYP-LAST}") == []
    # the status counts, not the name: an open theorem bears nothing
    opened = Index(index.values, {**index.theorems, "RMS-NORM": "open"}, index.hypotheses)
    assert any("open in the ledger" in p for p in check_source(ROOT / "paper" / "main.tex", opened))


def test_an_inputted_file_is_read_too(paper, tmp_path, index):
    (tmp_path / "part.tex").write_text("Loss 4.18.\n", encoding="utf-8")
    (tmp_path / "whole.tex").write_text("\\input{part.tex}\n", encoding="utf-8")
    assert [p.split(": ")[1] for p in check_source(tmp_path / "whole.tex", index)] == ["'4.18.'"]


@pytest.mark.parametrize("gone", [STUDY, PROBE, SCORES, *OTHERS])
def test_a_missing_results_folder_is_named_in_one_line(tmp_path, capsys, gone):
    root = linked(tmp_path, without=gone)
    words = ["generate", str(tmp_path / "paper"), "--results", str(root), "--published", str(PUBLISHED)]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{root / gone}: missing" in told
    assert not (tmp_path / "paper").exists()


def test_missing_published_numbers_and_generated_files_are_named(tmp_path, capsys):
    words = [
        "generate",
        str(tmp_path / "paper"),
        "--results",
        str(RESULTS),
        "--published",
        str(tmp_path / "x.yaml"),
    ]
    assert main(words) == 2 and "x.yaml: missing" in capsys.readouterr().err
    (tmp_path / "main.tex").write_text("text", encoding="utf-8")
    assert main(["check", str(tmp_path / "main.tex")]) == 2
    assert "index.json: cannot be read" in capsys.readouterr().err


def test_rebuilding_gives_the_same_bytes(paper, tmp_path, results):
    made = {p.relative_to(paper / "generated"): p.read_bytes() for p in (paper / "generated").rglob("*.*")}
    assert len(made) == len(FIGURES) + len(TABLES) + 3
    fresh = read_results(RESULTS, PUBLISHED)
    for name, table in TABLES.items():
        assert table(fresh).encode() == made[Path("tables") / f"{name}.tex"], name
    for name, draw in FIGURES.items():
        assert render(draw(fresh), "pdf") == made[Path("figures") / f"{name}.pdf"], name


def test_numbers_are_those_of_the_results(results):
    found = values(results)
    stored = json.loads((RESULTS / STUDY / "prune-reverse-8" / "result.json").read_text())
    assert found["study/loss/reverse-8"] == f"{stored['loss']:.2f}"
    ledger = json.loads((RESULTS / STUDY / "verify" / "ledger.json").read_text())["claims"]
    proved = [c for c in ledger if c["kind"] == "theorem" and c["status"] == "proved"]
    assert found["ledger/proved"] == str(len(proved))
    layers = pd.read_parquet(RESULTS / PROBE / "layers.parquet")
    own = layers.query("measure == 'grad_hidden' and site == 'block' and statistic == 'mean'").set_index(
        "layer"
    )
    assert found["probe/grad-hidden/ratio"] == f"{own.value[0] / own.value[30]:.0f}"
    bound = layers.query("measure == 'stack_sigma_bound' and layer == 0").value.iloc[0]
    exact = layers.query("measure == 'stack_sigma' and layer == 0").value.iloc[0]
    assert abs(float(found["probe/stack-overestimate"]) - math.log10(bound / exact)) < 1
    assert found["level"] == "95"


def test_numbers_of_the_other_studies_are_those_of_their_tables(results):
    found = values(results)
    removals = pd.read_parquet(RESULTS / "norm-placement" / "decide" / "removals.parquet")
    counts = []
    own = removals[(removals["placement"] == "post") & (removals["order"] == "deepest")]
    for _, losses in own[~own["last_kept"].astype(bool)].groupby("seed"):
        rise = losses.set_index("removed")["loss"] - losses["loss"].iloc[0]
        counts.append(next(n for n in range(len(rise)) if not rise[n + 1] <= 0.5))
    assert set(counts) == {int(found["norm-placement/trained/prunable-deepest-0.5/post"])}
    documents = pd.read_parquet(RESULTS / "reasoning" / "answer-prune-reverse-8" / "documents.parquet")
    facts = documents[documents["task"] == "jeopardy"]
    bits = f"{facts['bits'].sum() / facts['bytes'].sum():.2f}"
    assert found["reasoning/bits/prune-reverse-8/jeopardy"] == bits
    decided = json.loads((RESULTS / "reasoning" / "decide" / "verdicts.json").read_text())["verdicts"]
    assert int(found["reasoning/verdict/HYP-REASONING/number"]) == len(decided)
    assert found["reasoning/verdict/HYP-REASONING/reverse-8/low"] == tex(decided[2]["interval"][0])


def test_another_result_gives_another_number(tmp_path, results):
    root = linked(tmp_path, without=PROBE)
    (root / PROBE).mkdir()
    for file in (RESULTS / PROBE).iterdir():
        (root / PROBE / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((root / PROBE / "manifest.json").read_text())
    (root / PROBE / "manifest.json").write_text(json.dumps({**manifest, "loss": 9.876}))
    changed, before = values(read_results(root, PUBLISHED)), values(results)
    assert changed["probe/loss"] == "9.88"
    assert {key for key in before if before[key] != changed[key]} == {"probe/loss"}


def test_a_statement_that_the_code_changed_is_noticed(results):
    known = set(older_statements(results))
    claim = next(c for c in results.study.claims if c["id"] not in known)
    before = claim["statement"]
    try:
        claim["statement"] = before + " And more."
        assert set(older_statements(results)) == known | {claim["id"]}
    finally:
        claim["statement"] = before


def test_numbers_are_set_as_latex():
    assert [tex(x) for x in (10240, 0.0, 7581.2, 0.99758)] == ["10{,}240", "0", "7{,}581", "0.998"]
    assert tex(-0.99758) == "\\ensuremath{-}0.998"
    assert tex(7.98e96) == "\\ensuremath{7.98\\times10^{96}}"
    assert [rate(x) for x in (1e-5, 3e-4)] == ["\\ensuremath{10^{-5}}", "\\ensuremath{3\\times10^{-4}}"]


def test_ranks_are_drawn_for_every_block():
    table = pd.DataFrame({"layer": [0, 1, 2], "score": [0.3, 0.1, 0.2], "delta": [1.0, 3.0, 2.0]})
    texts = {t.get_text(): t.get_position() for t in damage_ranks(table).axes[0].texts}
    assert texts == {"0": (3.0, 1.0), "1": (1.0, 3.0), "2": (2.0, 2.0)}


def test_the_log_is_read(tmp_path):
    good = "This is pdfTeX\nOverfull \\hbox (4.9pt too wide) in paragraph at lines 1--2\nOutput written\n"
    log = tmp_path / "main.log"
    log.write_text(good, encoding="utf-8")
    assert check_log(log) == [] and main(["log", str(log)]) == 0
    bad = [
        "Overfull \\hbox (5.98pt too wide) in paragraph at lines 163--166",
        "Overfull \\vbox (12.0pt too high) has occurred while \\output is active",
        "LaTeX Warning: Reference `tab:x' on page 1 undefined on input line 3.",
        "Package natbib Warning: Citation `x' on page 1 undefined on input line 4.",
        "LaTeX Warning: There were multiply-defined labels.",
    ]
    for line in bad:
        log.write_text(f"{good}{line}\n", encoding="utf-8")
        assert check_log(log) == [f"{log}: {line}"]
        assert main(["log", str(log)]) == 1
    assert main(["log", str(tmp_path / "none.log")]) == 2
