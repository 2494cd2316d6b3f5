"""The page: structure, escaping, self-containment; and the whole build: determinism, bad input."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from preln.base.errors import InputError
from preln.report import build_report

TABLES = ("verdicts", "outcomes", "tasks", "paired", "costs")
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """Elements in order, with the text of the whole page; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def having(self, attribute: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if attribute in attributes]


@pytest.fixture(scope="module")
def source(built: Path) -> str:
    return (built / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_verdicts_come_first(page: Page) -> None:
    ids = [a["id"] for a in page.having("id")]
    names = ("verdicts", "outcomes", "tasks", "costs", "explorer", "figures", "ledger", "provenance")
    order = [f"r1-{name}" for name in names]
    assert [i for i in ids if i in order] == order
    assert len(ids) == len(set(ids))


def test_links_inside_the_page_lead_somewhere(page: Page) -> None:
    ids = {a["id"] for a in page.having("id")}
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert "#r1-file-probe-layers-parquet" in links


def test_links_to_files_lead_to_the_run(page: Page, built: Path) -> None:
    links = [a["href"] for tag, a in page.elements if tag == "a" and not a["href"].startswith("#")]
    assert any(link.endswith("probe/layers.parquet") for link in links)
    assert all((built / link).is_file() for link in links)


def test_data_never_becomes_markup(page: Page, source: str, hostile: str) -> None:
    assert hostile in "".join(page.text)
    assert "<script>alert" not in source
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [a for a in page.having("href") if "javascript:" in a["href"]]
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]


def test_only_the_pages_own_script_may_run(source: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)[1].replace("&#39;", "'")
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_nothing_is_fetched(page: Page, source: str) -> None:
    for _, attributes in page.elements:
        for name in ("src", "srcset", "action", "data", "poster"):
            assert name not in attributes
        for name in ("href", "xlink:href"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or "")
    assert "@import" not in source
    assert "url(http" not in source
    assert len(source.encode()) < 3_000_000


def test_every_figure_has_words_and_numbers(page: Page, source: str) -> None:
    figures = re.findall(r"<figure id=.*?</figure>", source, re.DOTALL)
    assert len(figures) == 8
    for figure in figures:
        alt = re.search(r'role="img" aria-label="([^"]{40,})"', figure)
        assert alt, figure[:200]
        assert re.search(r"\d", alt[1])
        assert figure.count("<svg ") == 2
        assert "Numbers of this figure" in figure
        assert figure.count("<tr>") > 4
    drawings = [a for tag, a in page.elements if tag == "svg"]
    assert all(a.get("aria-hidden") == "true" or a.get("aria-label") for a in drawings)


def test_ledger_can_be_filtered_and_shows_counterexamples(source: str, page: Page) -> None:
    claims = {a["id"]: a for a in page.having("data-status")}
    assert {a["data-status"] for a in claims.values()} == {"proved", "refuted", "open", "untested"}
    assert {a["data-kind"] for a in claims.values()} == {"theorem", "hypothesis"}
    refuted = re.search(r'<article[^>]*id="r1-claim-CMP-PAPER".*?</article>', source, re.DOTALL)[0]
    assert "Counterexample" in refuted
    assert "1.0, -1.0" in refuted
    assert "<details" not in refuted.split("Counterexample")[0]
    assert "<option>refuted</option>" in source


def test_theorems_are_counted_by_family(source: str) -> None:
    (table,) = re.findall(r'aria-label="Theorems by family">.*?</table>', source, flags=re.S)
    rows = [re.findall(r">([^<>\n]+)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", table, flags=re.S)]
    head = ["family", "theorems", "proved", "refuted", "open", "symbolic", "smt", "counterexample"]
    assert rows[0] == [*head, "mutants", "killed"]
    assert rows[1:] == [
        ["Normalisation layers", "3", "2", "1", "0", "2", "1", "1", "0", "0"],
        ["Depth", "1", "0", "0", "1", "0", "0", "0", "0", "0"],
    ]


def test_what_holds_instead_of_a_refuted_claim(source: str) -> None:
    refuted = re.search(r'<article[^>]*id="r1-claim-CMP-PAPER".*?</article>', source, re.DOTALL)[0]
    assert re.search(r'What does hold:\s*<a href="#r1-claim-CMP-PAPER-LATE">', refuted)


def test_verdicts_of_the_run_stand_in_its_ledger(run_folder: Path, tmp_path: Path, write_step) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(run_folder / "probe")  # figures take time, and this is not about them
    shutil.rmtree(run_folder / "decide")
    verdict = {"id": "HYP-SIGMA", "status": "unsupported"}
    write_step(run_folder, "decide", "decide", {"verdicts.json": {"verdicts": [verdict]}})
    source = build_report([run_folder], tmp_path / "out", figures=False).read_text()
    assert re.search(r'id="r1-claim-HYP-SIGMA" data-status="unsupported"', source)


def test_of_several_models_the_least_favourable_verdict_stands_in_the_ledger(
    run_folder: Path,
    tmp_path: Path,
    write_step,  # type: ignore[no-untyped-def]
) -> None:
    shutil.rmtree(run_folder / "probe")  # figures take time, and this is not about them
    shutil.rmtree(run_folder / "decide")
    found = {"reverse-8": "unsupported", "random-8": "supported"}
    verdicts = [{"id": "HYP-SIGMA", "model": model, "status": status} for model, status in found.items()]
    write_step(run_folder, "decide", "decide", {"verdicts.json": {"verdicts": verdicts}})
    source = build_report([run_folder], tmp_path / "out", figures=False).read_text()
    assert re.search(r'id="r1-claim-HYP-SIGMA" data-status="unsupported"', source)
    assert all(f"HYP-SIGMA on {model}" in source for model in found)
    assert "HYP-SIGMA on reverse-8" in (tmp_path / "out" / "tables" / "verdicts.tex").read_text()


def test_status_out_of_vocabulary_is_no_class(run_folder: Path, tmp_path: Path, write_step) -> None:  # type: ignore[no-untyped-def]
    shutil.rmtree(run_folder / "probe")  # figures take time, and this is not about them
    shutil.rmtree(run_folder / "decide")
    verdict = {"id": "X", "status": 'x" onclick="alert(1)', "evidence": None}
    write_step(run_folder, "decide", "decide", {"verdicts.json": {"verdicts": [verdict]}})
    source = build_report([run_folder], tmp_path / "out", figures=False).read_text()
    assert 'class="badge other"' in source
    assert "onclick" not in {name for _, a in Page(source).elements for name in a}


def test_files_written(built: Path) -> None:
    names = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    figures = (
        "depth-profile",
        "norm-sigma",
        "predicted-damage",
        "removal-order",
        "outcomes",
        "healing-curves",
        "healing-curves-seconds",
        "pair-distances",
    )
    expected = {f"figures/{f}-{w}.{k}" for f in figures for w in ("single", "double") for k in ("pdf", "png")}
    expected |= {f"figures/{f}.csv" for f in figures} | {"index.html"}
    expected |= {f"tables/{t}.{e}" for t in TABLES for e in ("csv", "tex")}
    assert names == expected


def test_another_process_writes_the_same_bytes(built: Path) -> None:
    again = built.parent / "again"
    command = "import sys; from preln.report import build_report; build_report([sys.argv[1]], sys.argv[2])"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Tokyo"}
    run = str(built.parent / "quickstart")
    subprocess.run([sys.executable, "-c", command, run, str(again)], env=environment, check=True)
    first = {p.relative_to(built): p.read_bytes() for p in built.rglob("*") if p.is_file()}
    second = {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert [str(name) for name in first if first[name] != second.get(name)] == []
    assert first.keys() == second.keys()


def test_bare_run_gives_a_page(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "manifest.json").write_text('{"status": "running"}')
    source = build_report([run], tmp_path / "out").read_text()
    assert "not finished" in source
    assert "<figure" not in source
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.html"]


def test_several_runs_have_sections_and_names_of_their_own(run_folder: Path, tmp_path: Path) -> None:
    for step in ("probe", "score", "verify"):
        shutil.rmtree(run_folder / step)
    twin = shutil.copytree(run_folder, tmp_path / "elsewhere" / "quickstart")
    index = build_report([run_folder, twin], tmp_path / "out", figures=False)
    ids = [a["id"] for a in Page(index.read_text()).having("id")]
    assert {"r1", "r2", "r1-verdicts", "r2-verdicts"} <= set(ids)
    assert len(ids) == len(set(ids))
    tables = {path.name for path in (tmp_path / "out" / "tables").iterdir()}
    assert {"quickstart-verdicts.csv", "quickstart-2-verdicts.csv"} <= tables


def test_damaged_run_writes_nothing(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "decide" / "verdicts.json").write_text("{}")
    with pytest.raises(InputError, match=r"verdicts\.json"):
        build_report([run_folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run"):
        build_report([], tmp_path / "out")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="taken"):
        build_report([run_folder], tmp_path / "taken")
