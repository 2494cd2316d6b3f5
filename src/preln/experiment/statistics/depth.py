"""What depth does to gradients and norms: statistics of the probe's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from preln.experiment.statistics.decisions import Measured, spearman
from preln.experiment.statistics.registry import MissingData, probe_sequences, resampled_means, statistic

if TYPE_CHECKING:
    from preln.experiment.lab import Lab


def _norm_sites(lab: Lab, measure: str) -> pd.DataFrame:
    """Per-sequence means at every norm, one row a norm: index (site, layer)."""
    parts = {}
    for site in ("attention", "mlp", "final_norm"):
        try:
            parts[site] = probe_sequences(lab, measure, site)
        except MissingData:
            continue
    if not parts:
        raise MissingData(f"the probe did not take {measure}: the model is not Pre-LN")
    return pd.concat(parts, names=["site", "layer"])


@statistic("HYP-ATTEN-HIDDEN", "spearman_depth", "rank correlation of |dL/dx_l| with l, l = 0 … L")
def hidden_attenuation(lab: Lab) -> Measured:
    """Rank correlation of the hidden-state gradient with depth, over resampled sequences."""
    squares = probe_sequences(lab, "grad_hidden") ** 2
    norms = np.sqrt(squares.mean(axis=1).to_numpy())
    draws = np.sqrt(resampled_means(squares, lab.study.seed))
    depth = squares.index.to_numpy()
    return Measured(
        value=spearman(norms, depth),
        resampled=np.array([spearman(row, depth) for row in draws]),
        n=squares.shape[1],
        note=f"|dL/dx_0| is {norms[0] / norms[-1]:.3g} times |dL/dx_L|; "
        f"{int((np.diff(norms) > 0).sum())} of {len(norms) - 1} steps go up",
        evidence=["probe/layers.parquet", "probe/sequences.parquet"],
    )


def _param_attenuation(lab: Lab, drop_last: int) -> Measured:
    path = lab.path("probe", "resamples.parquet")
    table = pd.read_parquet(lab.path("probe", "layers.parquet"))
    values = table.query("measure == 'grad_param' and site == 'block'").sort_values("layer")
    if values.empty or not path.is_file():
        raise MissingData("the probe did not take grad_param")
    draws = (
        pd.read_parquet(path)
        .query("site == 'block'")
        .pivot(index="draw", columns="layer", values="value")
        .to_numpy()
    )
    norms = values["value"].to_numpy()
    kept = slice(0, len(norms) - drop_last)
    depth = np.arange(len(norms))[kept]
    lowest, inner = int(np.argmin(norms)), spearman(norms[:-2], np.arange(len(norms) - 2))
    return Measured(
        value=spearman(norms[kept], depth),
        resampled=np.array([spearman(row[kept], depth) for row in draws]),
        n=int(values["n"].iloc[0]),
        note=f"block 0: {norms[0]:.3g}; lowest at block {lowest}: {norms[lowest]:.3g}; "
        f"last: {norms[-1]:.3g}; without the last two blocks the correlation is {inner:.3f}",
        evidence=["probe/layers.parquet", "probe/resamples.parquet"],
    )


@statistic("HYP-ATTEN-PARAM", "spearman_depth", "rank correlation of |dL/dtheta_l| with l, all blocks")
def param_attenuation(lab: Lab) -> Measured:
    """Rank correlation of the parameter gradient with depth."""
    return _param_attenuation(lab, 0)


@statistic(
    "HYP-ATTEN-PARAM", "spearman_depth_without_last_two", "the same correlation without the last two blocks"
)
def param_attenuation_inner(lab: Lab) -> Measured:
    """Rank correlation of the parameter gradient with depth, last two blocks left out."""
    return _param_attenuation(lab, 2)


@statistic(
    "HYP-SIGMA", "largest_share_le_one", "share of tokens with sigma^2 <= 1 at the norm where it is largest"
)
def variance_share(lab: Lab) -> Measured:
    """Largest share, over the norms, of tokens whose variance is at most one."""
    shares = _norm_sites(lab, "variance_le_one")
    means = shares.mean(axis=1)
    place: Any = means.index[int(means.to_numpy().argmax())]
    site, layer = place
    some = int((means > 0).sum())
    return Measured(
        value=float(means.max()),
        resampled=resampled_means(shares, lab.study.seed).max(axis=1),
        n=shares.shape[1],
        note=f"largest at the {site} norm of block {layer}; {some} of {len(means)} norms see such tokens; "
        f"over all norms the share is {means.mean():.3g}",
        evidence=["probe/layers.parquet", "probe/sequences.parquet"],
    )


@statistic(
    "HYP-B-LT1",
    "largest_mean_sigma",
    "mean over tokens of sigma(G), with the learned gain, at its largest norm",
)
def norm_sigma(lab: Lab) -> Measured:
    """Largest mean spectral norm of a norm's Jacobian, learned gain included."""
    sigma, bare = _norm_sites(lab, "norm_sigma"), _norm_sites(lab, "norm_sigma_no_gain")
    means = sigma.mean(axis=1)
    place: Any = means.index[int(means.to_numpy().argmax())]
    site, layer = place
    return Measured(
        value=float(means.max()),
        resampled=resampled_means(sigma, lab.study.seed).max(axis=1),
        n=sigma.shape[1],
        note=f"largest at the {site} norm of block {layer}; at or above 1: {int((means >= 1).sum())} of "
        f"{len(means)} norms with the learned gain, {int((bare.mean(axis=1) >= 1).sum())} without it",
        evidence=["probe/layers.parquet", "probe/sequences.parquet"],
    )
