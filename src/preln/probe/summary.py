"""What a probe's tables say, in a few tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

OVERVIEW = {
    "residual_rms": "rms",
    "update_ratio": "|F|/|x|",
    "update_cosine": "cos(F,x)",
    "block_influence": "BI",
    "massive_token_share": "top token",
    "effective_rank": "eff. rank",
    "grad_hidden": "|dL/dx|",
    "grad_param": "|dL/dW|",
    "first_order_damage": "damage",
    "lens_loss": "lens loss",
    "lens_agreement": "lens top-1",
}
NORMS = {"norm_input_variance": "variance", "variance_le_one": "share <= 1", "norm_sigma": "sigma",
         "norm_sigma_bound": "bound", "norm_sigma_no_gain": "no gain"}  # fmt: skip
BLOCKS = {"update_sigma": "sigma(J-I)", "update_sigma_bound": "bound", "block_sigma": "sigma(J)",
          "block_sigma_bound": "bound ", "block_sigma_min": "smallest", "block_sigma_min_bound": "at least",
          "stack_sigma": "stack", "stack_sigma_product": "product",
          "stack_sigma_log10_overestimate": "log10 over"}  # fmt: skip


def by_layer(layers: pd.DataFrame, names: dict[str, str], sites: Sequence[str] = ("block",)) -> pd.DataFrame:
    """Means of some measures, one row a layer (and site, if there are several), one column a measure."""
    chosen = layers[
        layers["measure"].isin(list(names))
        & layers["site"].isin(list(sites))
        & (layers["statistic"] == "mean")
    ]
    index = ["layer"] if len(sites) == 1 else ["layer", "site"]
    wide = chosen.pivot(index=index, columns="measure", values="value")
    wide = wide.reindex(columns=[name for name in names if name in wide])
    wide.columns = [names[name] for name in wide.columns]
    return wide


def _values(layers: pd.DataFrame, measure: str) -> pd.DataFrame:
    return layers.loc[(layers["measure"] == measure) & (layers["statistic"] == "mean")]


def answers(layers: pd.DataFrame) -> dict[str, Any]:
    """The questions that the bounds raise, answered from a table of layers; only those it can answer.

    Keys: ``growth_exponent`` (slope of log residual RMS against log l, l >= 1: 1/2 for uncorrelated updates
    of equal variance, 1 for aligned ones), ``sigma_above_one`` and ``variance_le_one`` ([layer, site, value]
    of the norms concerned, means over tokens), ``stack_overestimate`` (the factor by which the product of
    block bounds exceeds the stack's sigma from l = 0, as a power of 10), ``product_overestimate`` (the same
    for the product of measured block sigmas).
    """
    found: dict[str, Any] = {}
    rms = _values(layers, "residual_rms").sort_values("layer")
    if len(rms) > 3:
        depth = rms["layer"].to_numpy()[1:]
        slope = np.polyfit(np.log(depth), np.log(rms["value"].to_numpy()[1:]), 1)[0]
        found["growth_exponent"] = float(slope)
    for key, measure, low in (
        ("sigma_above_one", "norm_sigma", 1.0),
        ("variance_le_one", "variance_le_one", 0.0),
    ):
        rows = _values(layers, measure).sort_values(["layer", "site"])
        if len(rows):
            columns = (rows[name].tolist() for name in ("layer", "site", "value"))
            found[key] = [[*row] for row in zip(*columns, strict=True) if row[2] > low]
    over = _values(layers, "stack_sigma_log10_overestimate")
    if len(over):
        found["stack_overestimate"] = float(over.loc[over["layer"].idxmin(), "value"])
    stack, product = _values(layers, "stack_sigma"), _values(layers, "stack_sigma_product")
    if len(stack) and len(product):
        ratio = product.set_index("layer")["value"] / stack.set_index("layer")["value"]
        found["product_overestimate"] = float(np.log10(ratio.loc[ratio.index.min()]))
    return found


def _places(rows: list[list[Any]], total: int) -> str:
    """Names up to twelve places, or says that it is all of them."""
    if not rows:
        return "nowhere"
    if len(rows) == total:
        return f"at all {total} norms"
    named = [f"{layer} {site} ({value:.3g})" for layer, site, value in rows[:12]]
    more = f" and {len(rows) - 12} more" if len(rows) > 12 else ""
    return f"at {len(rows)} of {total} norms: {', '.join(named)}{more}"


def describe(layers: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """Tables by layer and the answers, as text."""
    parts = []
    for title, names, sites in (
        ("states and blocks (l = L: before the final norm)", OVERVIEW, ("block",)),
        ("norms at their real inputs", NORMS, ("attention", "mlp", "final_norm")),
        ("Jacobians on the whole sequence, and the theory's bounds", BLOCKS, ("block",)),
    ):
        table = by_layer(layers, names, sites)
        if len(table):
            parts.append(f"{title}\n{table.to_string(float_format='{:.4g}'.format, na_rep='')}")
    said, total = answers(layers), len(_values(layers, "norm_sigma"))
    if "growth_exponent" in said:
        parts.append(f"residual RMS grows with depth like l^{said['growth_exponent']:.2f}")
    if "sigma_above_one" in said:
        parts.append(f"sigma(G) > 1 {_places(said['sigma_above_one'], total)}")
    if "variance_le_one" in said:
        count = len(_values(layers, "variance_le_one"))
        parts.append(f"variance <= 1 (share of tokens) {_places(said['variance_le_one'], count)}")
    if "stack_overestimate" in said:
        text = f"the product of block bounds is 10^{said['stack_overestimate']:.1f} times the stack's sigma"
        if "product_overestimate" in said:
            text += f", that of measured block sigmas 10^{said['product_overestimate']:.1f} times"
        parts.append(text + " (from block 0)")
    return "\n\n".join([*parts, *notes])
