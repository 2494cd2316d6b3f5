"""The page of criteria is made from the tables of a comparison; its table of systems names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.cli import main
from preln.prune import CRITERIA, HALF_METRICS, PRESETS, REPLACEMENTS
from preln.prune.compare import MEASURED
from preln.report import selection
from preln.report.markdown import fill

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "smollm2-scores"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "tiny"
    words = ["score", "tiny:llama:5", "--metrics", "reverse,angular,sleb,finercut,llm_drop_mlp"]
    assert main([*words, "--damage", "1,3", "--sequences", "3", "--length", "16", "--out", str(out)]) == 0
    return out


def test_every_criterion_and_replacement_has_its_row():
    text = selection.systems()
    for name in CRITERIA:
        assert f"`--metric {name}`" in text or f"`{name}`" in text, name
    for name in HALF_METRICS:
        assert f"`--metric {name}`" in text, name
    for name in REPLACEMENTS:
        assert f"`--method {name}`" in text, name
    assert "`--protect shortened-plus`" in text


def test_everything_in_the_table_exists():
    known = {*CRITERIA, *HALF_METRICS, *REPLACEMENTS, *PRESETS, "block_influence@1"}
    asked = re.findall(r"`--(?:metric|method|protect) ([^`]+)`", selection.systems())
    assert len(asked) > 25 and set(asked) <= known


@pytest.mark.parametrize("page", ["README.md", "docs/criteria.md"])
def test_the_pages_hold_the_table_of_systems(page):
    path = ROOT / page
    assert fill(path, {"systems": selection.systems()}) == path.read_text(encoding="utf-8")


def test_the_page_shows_the_tables(folder):
    found = selection.parts(folder)
    damage = pd.read_parquet(folder / "damage.parquet").set_index(["metric", "drop"])
    assert f"| `reverse` | {damage.loc[('reverse', 1), 'loss']:.3f} [" in found["selection-damage"]
    assert "1: 4 ; 3: 2–4" in found["selection-damage"]
    assert len(found["selection-damage"].splitlines()) == 2 + 5
    assert "| `reverse` | 4 3 2 1 0 |" in found["selection-orders"]
    assert f"`{MEASURED}`" in found["selection-correlations"]
    assert found["selection-correlations"].count("| 1.00 |") >= 4  # the diagonal
    assert f"{damage.loc[('dense', 0), 'loss']:.3f} nats" in found["selection-provenance"]
    table = pd.read_parquet(folder / "correlations.parquet").set_index(["metric", "other"])
    assert f"| `sleb` | {table.loc[('sleb', MEASURED), 'spearman']:.2f} |" in found["selection-agreement"]


def test_halves_are_named_by_kind():
    assert selection._spans("0a,3a,4a,5m") == "a of 0, 3–4, m of 5"
    assert selection._spans("3,4,9") == "3–4, 9"


@pytest.mark.parametrize("width", ["single", "double"])
def test_the_figure_holds_every_loss(folder, width):
    damage = pd.read_parquet(folder / "damage.parquet")
    figure = selection.selection_damage(damage, width=width)
    drawn = {round(float(x), 9) for line in figure.axes[0].get_lines() for x in line.get_xdata()}
    assert {round(loss, 9) for loss in damage["loss"]} <= drawn
    with pytest.raises(InputError, match="nothing to draw"):
        selection.selection_damage(damage[damage["drop"] == 0])


@pytest.mark.skipif(not RESULTS.exists(), reason="no committed comparison")
def test_the_committed_page_is_that_of_the_committed_tables():
    page = ROOT / "docs" / "criteria.md"
    assert fill(page, selection.parts(RESULTS)) == page.read_text(encoding="utf-8")
