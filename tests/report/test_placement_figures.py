import itertools
import json
from types import SimpleNamespace

import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.base.files import hash_tree
from preln.report.load import load_run
from preln.report.placement_figures import (
    NORM_PLACEMENT,
    describe_placement,
    norm_placement,
    placement_table,
)
from preln.report.style import render

PLACEMENTS = ("pre", "post", "scaled")


@pytest.fixture
def tables():
    """Depth and removals of two seeds: every number is its own, so a swap shows."""
    depth, removals = [], []
    for number, (placement, seed) in enumerate(itertools.product(PLACEMENTS, (0, 1))):
        for state, measure in itertools.product(("initial", "trained"), ("grad_hidden", "angular_distance")):
            start = 1 + number + 10 * (state == "trained") + 100 * (measure == "grad_hidden")
            depth += [(placement, seed, state, measure, layer, start / (1 + layer)) for layer in range(4)]
        for order, kept in itertools.product(("deepest", "block_influence"), (False, True)):
            shift = 1000 * (order != "deepest") + 500 * kept
            removals += [
                (placement, seed, order, kept, count, 2.0 + number + count + shift) for count in range(3)
            ]
    return (
        pd.DataFrame(depth, columns=["placement", "seed", "state", "measure", "layer", "value"]),
        pd.DataFrame(removals, columns=["placement", "seed", "order", "last_kept", "removed", "loss"]),
    )


def test_the_table_is_means_and_ranges_over_seeds(tables):
    table = placement_table(*tables).set_index(["panel", "placement", "layer"])
    assert set(table["n"]) == {2}
    row = table.loc[("gradient", "post", 1)]
    assert (row["low"], row["value"], row["high"]) == (113 / 2, 113.5 / 2, 114 / 2)
    assert table.loc[("angle", "pre", 0), "value"] == 11.5
    assert table.loc[("loss", "scaled", 2), "value"] == 2.0 + 4.5 + 2
    first = placement_table(*tables, state="initial").set_index(["panel", "placement", "layer"])
    assert first.loc[("gradient", "pre", 0), "value"] == 101.5
    assert first.loc[("loss", "pre", 0), "value"] == table.loc[("loss", "pre", 0), "value"]


@pytest.mark.parametrize("width", ["single", "double"])
def test_the_figure_draws_every_placement_in_every_panel(tables, width):
    table = placement_table(*tables)
    figure = norm_placement(table, width=width)
    assert len(figure.axes) == 3
    for axis, panel in zip(figure.axes, ("gradient", "angle", "loss"), strict=True):
        drawn = {tuple(line.get_ydata()) for line in axis.lines}
        rows = table[table["panel"] == panel]
        assert drawn == {tuple(r.sort_values("layer")["value"]) for _, r in rows.groupby("placement")}
        assert len(axis.collections) == len(PLACEMENTS)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Pre-LN", "Post-LN", "Pre-LN scaled by 1/√l"]
    assert render(figure, "png")[:4] == b"\x89PNG"


def test_the_words_name_both_ends_of_every_line(tables):
    text = describe_placement(placement_table(*tables))
    assert text.count(".") >= 3
    assert "Post-LN: gradient 113.5 at depth 0 and 28.38 at depth 3" in text
    assert "at removed blocks 2" in text
    assert "sandwich" not in text


def test_nothing_and_unknown_placements_are_refused(tables):
    with pytest.raises(InputError, match="nothing to draw"):
        norm_placement(placement_table(*tables).iloc[:0])
    other = placement_table(*tables).replace({"placement": {"post": "mid"}})
    with pytest.raises(InputError, match="placement 'mid': unknown"):
        norm_placement(other)


def test_a_run_gives_the_same_table_and_other_runs_none(tables, tmp_path):
    folder = tmp_path / "run" / "decide"
    folder.mkdir(parents=True)
    for name, table in zip(("depth", "removals"), tables, strict=True):
        table.to_parquet(folder / f"{name}.parquet")
    (folder / "verdicts.json").write_text('{"verdicts": []}')
    record = {"id": "decide", "kind": "decide", "seconds": 1.0, "files": hash_tree(folder)}
    (folder / "step.json").write_text(json.dumps(record))
    (tmp_path / "run" / "manifest.json").write_text("{}")
    run = load_run(tmp_path / "run")
    found = NORM_PLACEMENT.table(run)
    pd.testing.assert_frame_equal(found, placement_table(*tables))
    assert len(NORM_PLACEMENT.draw(run, "double").axes) == 3
    assert NORM_PLACEMENT.table(SimpleNamespace(steps=())) is None
