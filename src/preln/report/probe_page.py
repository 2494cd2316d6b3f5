"""What a stored probe found, as Markdown: for a page whose every number comes from its tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from preln.base.files import read_json
from preln.probe import answers
from preln.probe.measures import GROUPS
from preln.report.markdown import cell

_NORMS = ("norm_sigma", "norm_sigma_bound", "norm_sigma_no_gain", "norm_input_variance", "variance_le_one")
_BLOCKS = ("update_sigma", "update_sigma_bound", "block_sigma", "block_sigma_bound", "block_sigma_min",
           "block_sigma_min_bound")  # fmt: skip
_STACK = ("stack_sigma", "stack_sigma_product", "stack_sigma_bound")
_LENS = ("lens_loss", "lens_agreement")


def measures() -> str:
    """Every measure by group, with its definition."""
    lines = ["| group | measure | what it is |", "|---|---|---|"]
    lines += [
        f"| `{group}` | `{name}` | {cell(text)} |"
        for group, names in GROUPS.items()
        for name, text in names.items()
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.2e}" if value != 0 and not 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def _table(layers: pd.DataFrame, names: tuple[str, ...], sites: tuple[str, ...]) -> str:
    """One row a layer (and site), one column a measure, with intervals where they are."""
    means = layers[(layers["statistic"] == "mean") & layers["site"].isin(sites)].set_index(
        ["layer", "site", "measure"]
    )
    held = [n for n in names if n in means.index.get_level_values("measure")]
    keys = means.index[means.index.get_level_values("measure").isin(held)].droplevel("measure").unique()
    several = len(sites) > 1
    lines = [f"| l |{' site |' if several else ''} " + " | ".join(f"`{n}`" for n in held) + " |"]
    lines.append("|---" * (len(held) + 1 + several) + "|")
    for layer, site in sorted(keys):
        cells = []
        for name in held:
            if (layer, site, name) not in means.index:
                cells.append("–")
                continue
            row = means.loc[(layer, site, name)]
            known = math.isfinite(row["low"]) and not name.endswith(("_bound", "_product"))
            interval = f" [{_number(row['low'])}, {_number(row['high'])}]" if known else ""
            cells.append(f"{_number(row['value'])}{interval}")
        lines.append(f"| {layer} |{f' {site} |' if several else ''} " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _provenance(manifest: dict[str, Any]) -> str:
    tokens = manifest["tokens"]
    few = manifest.get("jacobian_sequences", 0)
    return (
        f"{manifest['model']}: {manifest['num_blocks']} blocks, measured as {manifest['placement']}, "
        f"{manifest['dtype']}, attention `{manifest['attn_implementation']}`; "
        f"{tokens['sequences']} sequences, {tokens['real']:,} tokens, loss {manifest['loss']:.3f} nats; "
        f"Jacobian norms on the first {few} sequences; 95 % intervals by {manifest['bootstrap']:,} "
        f"bootstrap samples of sequences; commit `{str(manifest['git']['commit'])[:12]}`."
    )


def _said(layers: pd.DataFrame, manifest: dict[str, Any]) -> str:
    said, last = answers(layers), manifest["num_blocks"]
    lines = []

    def places(rows: list[list[Any]]) -> str:
        named = [
            f"{'the final norm' if layer == last else f'block {layer} ({site})'} ({value:.3g})"
            for layer, site, value in rows
        ]
        return ", ".join(named) if named else "nowhere"

    if "stack_overestimate" in said:
        bound, product = said["stack_overestimate"], said["product_overestimate"]
        lines.append(
            f"- The product of the theory's block bounds is 10^{bound:.1f} times the whole stack's sigma; "
            f"that of the measured sigma(J) is 10^{product:.1f} times."
        )
    if "sigma_above_one" in said:
        lines.append(f"- sigma(G) > 1 (mean over tokens) at: {places(said['sigma_above_one'])}.")
    if "variance_le_one" in said:
        lines.append(f"- sigma^2 <= 1 (share of tokens) at: {places(said['variance_le_one'])}.")
    if "growth_exponent" in said:
        lines.append(f"- The residual stream's RMS grows with depth like l^{said['growth_exponent']:.2f}.")
    return "\n".join(lines)


def parts(folder: str | Path) -> dict[str, str]:
    """The generated parts of the probe's page, by the name of their markers.

    Args:
        folder: What :func:`preln.probe.write_probe` wrote.
    """
    layers = pd.read_parquet(Path(folder) / "layers.parquet")
    manifest = read_json(Path(folder) / "manifest.json")
    norms = ("attention", "mlp", "final_norm")
    return {
        "probe-measures": measures(),
        "probe-provenance": _provenance(manifest),
        "probe-answers": _said(layers, manifest),
        "probe-blocks": _table(layers, _BLOCKS, ("block",)),
        "probe-stack": _table(layers, _STACK, ("block",)),
        "probe-norms": _table(layers, _NORMS, norms),
        "probe-lens": _table(layers, _LENS, ("block",)),
    }
