"""The heat map holds the stored distances, and marks what was removed and what would be least."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from preln.base.errors import InputError
from preln.report.distance_figures import distance_table, pair_distances, windows, windows_by_place
from preln.report.load import load_run
from preln.report.style import WIDTHS


def test_least_of_each_size_against_a_slow_search(run_folder: Path) -> None:
    pairs = load_run(run_folder).pairs
    table = distance_table(pairs)
    for size, own in pairs.groupby("size"):
        least = min(zip(own["angular_distance_last_token"], own["start"], strict=True))
        marked = table[(table["size"] == size) & table["least"]]
        assert list(zip(marked["distance"], marked["start"], strict=True)) == [least]


def test_all_tokens_stand_in_where_the_last_token_is_not_stored(run_folder: Path) -> None:
    pairs = load_run(run_folder).pairs
    both, one = distance_table(pairs), distance_table(pairs.drop(columns="angular_distance_last_token"))
    assert not np.allclose(both["distance"], one["distance"])
    assert set(one["distance"]) == set(pairs["angular_distance"])


@pytest.mark.parametrize("width", list(WIDTHS))
def test_the_map_plots_every_distance(run_folder: Path, width: str) -> None:
    run = load_run(run_folder)
    figure = pair_distances(run.pairs, windows(run), width=width)
    axis = figure.axes[0]
    grid = axis.collections[0].get_array().reshape(6, 6)
    for row in distance_table(run.pairs).to_dict("records"):
        assert grid[row["size"] - 1, row["start"]] == row["distance"]
    assert int(grid.mask.sum()) == 15  # runs that would pass the last block
    marks = [
        tuple(map(int, point))
        for line in axis.get_lines()[1:]
        for point in zip(*line.get_data(), strict=True)
    ]
    expected = []
    for prune in run.prunes:
        drop = sorted(prune["drop"])
        if drop[-1] - drop[0] + 1 == len(drop):
            expected.append((drop[0], len(drop)))
    assert sorted(marks) == sorted(set(expected)) and expected


def test_scattered_blocks_are_no_window(run_folder: Path) -> None:
    run = load_run(run_folder)
    for prune in run.prunes:
        prune["drop"][:] = [0, 2]
    assert windows(run).empty


def test_one_mark_for_the_same_blocks() -> None:
    chosen = pd.DataFrame({"name": ["a-2", "b-2", "c-1"], "start": [3, 3, 0], "size": [2, 2, 1]})
    assert windows_by_place(chosen) == {"c-1": [(0, 1)], "a-2, b-2": [(3, 2)]}
    assert windows_by_place(None) == {}


def test_an_empty_table_is_refused(run_folder: Path) -> None:
    with pytest.raises(InputError, match="angular distances"):
        pair_distances(load_run(run_folder).pairs.iloc[:0])
