"""A page of a probe is made from its tables, and they answer what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from preln.base.errors import InputError
from preln.base.files import read_json
from preln.models import tiny_model
from preln.probe import MEASURES, answers, probe_tables, write_probe
from preln.report import figures
from preln.report.markdown import fill
from preln.report.probe_page import measures, parts
from preln.report.style import render

ROOT = Path(__file__).parents[2]
PAGE = "\n".join(
    f"<!-- probe-{name}:begin -->\n<!-- probe-{name}:end -->"
    for name in ("measures", "provenance", "answers", "blocks", "stack", "norms", "lens")
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder of a probe of a tiny model."""
    ids = torch.randint(1, 512, (4, 6), generator=torch.Generator().manual_seed(0))
    result = probe_tables(tiny_model("llama"), ids, measures=["all"], batch_size=1)
    return write_probe(result, tmp_path_factory.mktemp("probe") / "tiny")


@pytest.fixture(scope="module")
def layers(results: Path) -> pd.DataFrame:
    return pd.read_parquet(results / "layers.parquet")


def mean(layers: pd.DataFrame, measure: str, site: str = "block") -> pd.Series:
    rows = layers.query("measure == @measure and site == @site and statistic == 'mean'")
    return rows.set_index("layer")["value"].sort_index()


def test_the_page_names_every_measure_as_it_is():
    page = ROOT / "docs" / "probe.md"
    assert fill(page, {"probe-measures": measures()}) == page.read_text(encoding="utf-8")


def test_a_page_shows_the_tables(results, layers, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    text = fill(page, parts(results))
    assert "4 blocks, measured as pre-ln, float32, attention `sdpa`; 4 sequences, 24 tokens" in text
    assert f"| {mean(layers, 'lens_loss')[2]:.3g} [" in text
    assert f"| {mean(layers, 'stack_sigma')[0]:.3g} [" in text
    assert f"10^{answers(layers)['stack_overestimate']:.1f} times the whole stack's sigma" in text
    assert text.count("\n| 3 |") == 5  # blocks, stack, lens, and two norms


def test_every_measure_is_named_and_was_taken(layers):
    text = measures()
    assert all(f"`{name}`" in text for name in MEASURES)
    assert set(MEASURES) <= set(layers["measure"])


def test_the_answers_are_those_of_the_table(layers):
    said = answers(layers)
    stack, bound = mean(layers, "stack_sigma"), mean(layers, "stack_sigma_bound")
    assert stack.index.tolist() == bound.index.tolist() == list(range(4))
    # the answer is a mean over sequences of logarithms, this one the logarithm of means
    assert said["stack_overestimate"] == pytest.approx(np.log10(bound[0] / stack[0]), rel=0.2)
    above = {(layer, site) for layer, site, _ in said["sigma_above_one"]}
    for site in ("attention", "mlp", "final_norm"):
        sigma = mean(layers, "norm_sigma", site)
        assert {layer for layer, where in above if where == site} == set(sigma[sigma > 1].index)


def check_bounds(layers):
    for name in ("update_sigma", "block_sigma", "stack_sigma", "stack_sigma_product"):
        value = mean(layers, name)
        bound = mean(layers, "stack_sigma_bound" if name == "stack_sigma_product" else f"{name}_bound")
        assert (value <= bound * (1 + 1e-3)).all(), name
    assert (mean(layers, "block_sigma_min_bound") <= mean(layers, "block_sigma_min") + 1e-3).all()


def test_bounds_hold(layers):
    check_bounds(layers)


def test_a_page_without_markers_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(InputError, match="probe-measures"):
        fill(tmp_path / "page.md", {"probe-measures": ""})


@pytest.mark.parametrize("width", ["single", "double"])
def test_figures_plot_the_tables(layers, width):
    drawn = figures.jacobian_bounds(layers, width=width)
    lines = [np.asarray(line.get_ydata(), float) for axis in drawn.axes for line in axis.get_lines()]
    for name in ("block_sigma", "update_sigma", "block_sigma_bound", "stack_sigma", "stack_sigma_bound"):
        assert any(np.array_equal(line, mean(layers, name).to_numpy()) for line in lines), name
    lens = figures.logit_lens(layers, width=width)
    lines = [np.asarray(line.get_ydata(), float) for axis in lens.axes for line in axis.get_lines()]
    assert any(np.array_equal(line, mean(layers, "lens_loss").to_numpy()) for line in lines)


def test_nothing_is_drawn_from_nothing(layers):
    empty = layers[layers["measure"] == "residual_rms"]
    for draw in (figures.jacobian_bounds, figures.logit_lens):
        with pytest.raises(InputError, match="nothing to draw"):
            draw(empty)


COMMITTED = ROOT / "experiments" / "results" / "smollm2-probe"


def test_the_committed_page_is_that_of_the_committed_tables():
    page = ROOT / "docs" / "probe.md"
    assert fill(page, parts(COMMITTED)) == page.read_text(encoding="utf-8")


def test_the_committed_probe_is_of_the_real_model_and_whole():
    manifest = read_json(COMMITTED / "manifest.json")
    assert manifest["git"]["dirty"] is False and manifest["num_blocks"] == 30
    assert manifest["model"].startswith("smollm2-135m")
    assert set(MEASURES) <= set(pd.read_parquet(COMMITTED / "layers.parquet")["measure"])


def test_bounds_hold_on_the_real_model():
    layers = pd.read_parquet(COMMITTED / "layers.parquet")
    check_bounds(layers)
    for site in ("attention", "mlp", "final_norm"):
        sigma, bound = (mean(layers, name, site) for name in ("norm_sigma", "norm_sigma_bound"))
        assert (sigma <= bound * (1 + 1e-6)).all()


def test_the_committed_pictures_are_those_of_the_tables():
    layers = pd.read_parquet(COMMITTED / "layers.parquet")
    for name, draw in (("jacobian_bounds", figures.jacobian_bounds), ("logit_lens", figures.logit_lens)):
        assert render(draw(layers, width="double"), "png") == (ROOT / "docs" / f"{name}.png").read_bytes()
