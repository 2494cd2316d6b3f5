r"""Numbers of the write-up by key, as LaTeX: ``\val{probe/loss}`` prints what is stored under that key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pandas as pd

from preln.base.stats import bootstrap_interval
from preln.probe import answers
from preln.report.paper.results import Results, rate, tex
from preln.report.paper.studies import study_values
from preln.report.summary import dense_loss, spearman

_SYMBOLS = {
    **{"eps": r"\varepsilon", "weight": r"\gamma", "branch": "A", "upstream": "u", "sigma": r"\sigma"},
    **{"sigma_rms": r"\sigma_{\mathrm{RMS}}", "sigma_ln": r"\sigma_{\mathrm{LN}}", "var": r"\sigma^2"},
    **{"x": "x", "gradient_norm_before": "|J^{\\top}u|", "gradient_norm_after": "|u|"},
}

_SERIES = (
    *("residual_rms", "grad_hidden", "grad_param", "massive_token_share", "update_ratio", "block_influence"),
    *("block_sigma", "block_sigma_min", "block_sigma_bound", "update_sigma", "update_sigma_bound"),
    *("stack_sigma", "stack_sigma_bound", "lens_loss", "lens_agreement"),
)


def values(results: Results) -> dict[str, str]:
    """Every number that the text may use, by key."""
    found: dict[str, str] = {}
    for part in (_ledger, _study, _verdicts, _probe, _scores, _published, study_values):
        for key, value in part(results):
            name = key.replace("_", "-")
            found[name] = value if isinstance(value, str) else tex(value)
    return dict(sorted(found.items()))


def theorems(results: Results) -> dict[str, str]:
    """The status of every theorem of the stored ledger."""
    return {str(c["id"]): str(c["status"]) for c in results.study.claims if c.get("kind") == "theorem"}


def _ledger(results: Results) -> Iterator[tuple[str, Any]]:
    statuses = list(theorems(results).values())
    yield "ledger/theorems", len(statuses)
    for status in ("proved", "refuted", "open"):
        yield f"ledger/{status}", statuses.count(status)
    controls = [
        control
        for claim in results.study.claims
        for item in claim.get("evidence") or []
        for control in (item.get("detail") or {}).get("negative_controls", [])
    ]
    yield "ledger/controls", len(controls)
    yield "ledger/controls-rejected", sum(bool(control.get("rejected")) for control in controls)
    for claim in results.study.claims:
        against = [e["detail"] for e in claim.get("evidence") or [] if e["kind"] == "counterexample"]
        for number, detail in enumerate(against, 1):
            yield f"ledger/{claim['id']}/example{'' if number == 1 else number}", _example(detail)
        for item in claim.get("evidence") or []:
            for step in (item.get("detail") or {}).get("steps", []):  # such as "head +1: 743.45M"
                said = re.fullmatch(r"(\w+(?: \+\d)?): ([\d.]+)M", str(step.get("step")))
                if said and step.get("holds"):
                    yield f"ledger/{claim['id']}/{said[1].replace(' +', '-')}", said[2]


def _example(detail: dict[str, Any]) -> str:
    """A counterexample as LaTeX: the instance, then what came out."""
    parts = []
    for group in ("instance", "values"):
        shown = {k: v for k, v in detail.get(group, {}).items() if k not in ("layer", "layers")}
        told = (f"{_symbol(name)}={_exact(value)}" for name, value in shown.items())
        parts.append(", ".join(f"${one}$" for one in told))
    return ": ".join(parts)


def _symbol(name: str) -> str:
    words = name.replace("_", " ")
    return _SYMBOLS.get(name, rf"\mathit{{{words}}}".replace(" ", "\\ "))


def _exact(value: Any) -> str:
    return f"({', '.join(map(_exact, value))})" if isinstance(value, list) else str(value)


def _shape(key: str, shape: list[int]) -> Iterator[tuple[str, Any]]:
    yield f"{key}/sequences", int(shape[0])
    yield f"{key}/length", int(shape[1])
    yield f"{key}/tokens", int(shape[0] * shape[1])


def _study(results: Results) -> Iterator[tuple[str, Any]]:
    run, config = results.study, results.study.config
    yield "study/blocks", int(run.manifest["model"]["blocks"])
    for name, data in run.manifest["data"].items():
        yield from _shape(f"study/{name}", data["shape"])
    dense = dense_loss(run)
    if dense is not None:
        yield "study/loss/dense", f"{dense:.2f}"
    for prune in run.prunes:
        key = f"{prune['metric']}-{len(prune['drop'])}"
        yield f"study/loss/{key}", f"{prune['loss']:.2f}"
        yield "study/dropped", len(prune["drop"])
    for heal in run.heals:
        key = f"{heal['metric']}-{len(heal['drop'])}-{heal['recipe']}"
        yield f"study/loss/{key}", f"{heal['loss_after']:.2f}"
        yield f"study/loss/{key}/low", f"{heal['low']:.2f}"
        yield f"study/loss/{key}/high", f"{heal['high']:.2f}"
        yield f"study/trained/{heal['recipe']}", f"{heal['trainable_parameters'] / 1e6:.2f}"
        yield f"study/rate/{heal['recipe']}", rate(heal["learning_rate"])
        yield f"study/seconds/{key}", f"{heal['seconds']:.0f}"
        yield "study/healing-tokens", int(heal["tokens"])
        yield "study/healing-steps", int(heal["steps"])
    yield "study/tasks/limit", int(config["tasks"]["limit"])
    yield "study/tasks/number", len(config["tasks"]["names"])
    errors = [task["acc_stderr"] for e in run.evaluations for task in e["tasks"].values()]
    yield "study/tasks/stderr-low", f"{min(errors):.2f}"
    yield "study/tasks/stderr-high", f"{max(errors):.2f}"
    yield "study/commit", str(run.manifest["git"]["commit"])[:12]
    yield "study/model-sha", str(run.manifest["model"]["sha256"])[:12]
    for package, version in run.manifest["packages"].items():
        yield f"study/package/{package}", str(version)
    if run.damage is not None:
        table: Any = run.damage.set_index("layer")["delta"]
        yield "study/damage/largest", f"{table.max():.2f}"
        yield "study/damage/largest-at", int(table.idxmax())
        yield "study/damage/least", f"{table.min():.3f}"
        yield "study/damage/least-at", int(table.idxmin())


def _verdicts(results: Results) -> Iterator[tuple[str, Any]]:
    counts: dict[str, int] = {"supported": 0, "unsupported": 0, "inconclusive": 0}
    for verdict in results.study.verdicts:
        key = f"verdict/{verdict['id']}"
        for name in ("value", "threshold"):
            if verdict.get(name) is not None:
                yield f"{key}/{name}", float(verdict[name])
        for name, bound in zip(("low", "high"), verdict.get("interval") or (), strict=False):
            yield f"{key}/{name}", float(bound)
        counts[verdict["status"]] = counts.get(verdict["status"], 0) + 1
    level = inspect.signature(bootstrap_interval).parameters["level"].default
    yield "level", f"{100 * level:.0f}"
    yield "verdict/number", sum(counts.values())
    for status, count in counts.items():
        yield f"verdict/{status}", count
    tested = {verdict["id"] for verdict in results.study.verdicts}
    named = {c["id"] for c in results.study.claims if c.get("kind") == "hypothesis"}
    yield "verdict/untested", len(named - tested)


def _probe(results: Results) -> Iterator[tuple[str, Any]]:
    manifest, layers = results.probe, results.layers
    plain: Any = layers[layers["statistic"] == "mean"]

    def series(measure: str, site: str = "block") -> Any:
        rows = plain[(plain["measure"] == measure) & (plain["site"] == site)]
        return rows.set_index("layer")["value"].sort_index()

    last = int(manifest["num_blocks"])
    yield "probe/blocks", last
    yield "probe/sequences", int(manifest["tokens"]["sequences"])
    yield "probe/tokens", int(manifest["tokens"]["real"])
    yield "probe/jacobian-sequences", int(manifest["jacobian_sequences"])
    yield "probe/loss", f"{manifest['loss']:.2f}"
    yield "probe/bootstrap", int(manifest["bootstrap"])
    yield "probe/commit", str(manifest["git"]["commit"])[:12]
    for name in _SERIES:
        found = series(name)
        yield f"probe/{name}/first", found.iloc[0]
        yield f"probe/{name}/last", found.iloc[-1]
        yield f"probe/{name}/least", found.min()
        yield f"probe/{name}/least-at", int(found.idxmin())
        yield f"probe/{name}/largest", found.max()
        yield f"probe/{name}/largest-at", int(found.idxmax())
        yield f"probe/{name}/spearman", spearman(pd.Series(range(len(found))), found.reset_index(drop=True))
    gradient, update = series("grad_hidden"), series("update_sigma")
    yield "probe/grad_hidden/ratio", f"{gradient.iloc[0] / gradient.iloc[-1]:.0f}"
    yield "probe/grad_hidden/ratio-from-one", f"{gradient.loc[1] / gradient.iloc[-1]:.0f}"
    yield "probe/grad_hidden/rises", int((gradient.diff().iloc[1:] > 0).sum())
    yield "probe/update_sigma/above-one", int((update > 1).sum())
    said = answers(layers)
    yield "probe/growth-exponent", f"{said['growth_exponent']:.2f}"
    yield "probe/stack-overestimate", f"{said['stack_overestimate']:.0f}"
    yield "probe/product-overestimate", f"{said['product_overestimate']:.0f}"
    norms = plain[plain["measure"] == "norm_sigma"]
    bare = plain[plain["measure"] == "norm_sigma_no_gain"]
    violated = plain[plain["measure"] == "variance_le_one"]
    tight = plain[plain["measure"] == "norm_sigma_tightness"]
    yield "probe/norms", len(norms)
    yield "probe/norms-above-one", int((norms["value"] > 1).sum())
    yield "probe/norms-violated", int((violated["value"] > 0).sum())
    yield "probe/norm-sigma/first-attention", series("norm_sigma", "attention").iloc[0]
    yield "probe/norm-sigma/first-mlp", series("norm_sigma", "mlp").iloc[0]
    yield "probe/norm-sigma/largest-after", norms[norms["layer"] > 0]["value"].max()
    yield "probe/norm-sigma/largest-last", norms[norms["layer"] == last - 1]["value"].max()
    yield "probe/norm-sigma/no-gain-first", bare[bare["layer"] == 0]["value"].max()
    yield "probe/norm-sigma/tightness-least", tight["value"].min()
    yield "probe/variance/first", series("norm_input_variance", "attention").iloc[0]
    share = series("massive_token_share")
    held = share[share > 0.5].index
    yield "probe/massive/from", int(held.min())
    yield "probe/massive/to", int(held.max())


def _scores(results: Results) -> Iterator[tuple[str, Any]]:
    manifest = results.scores
    damage: Any = results.damage  # pandas types a selection as frame, series and array at once
    correlations: Any = results.correlations
    yield from _shape("scores/calibration", manifest["tokens"]["shape"])
    yield from _shape("scores/held-out", manifest["held_out"]["shape"])
    yield "scores/commit", str(manifest["git"]["commit"])[:12]
    yield "scores/loss/dense", f"{damage.loc[damage['drop'] == 0, 'loss'].iloc[0]:.2f}"
    cut = damage[damage["drop"] > 0]
    yield "scores/criteria", cut["metric"].nunique()
    for number, size in enumerate(sorted(cut["drop"].unique().tolist()), 1):
        yield f"scores/size/{number}", int(size)
    for row in cut.to_dict("records"):
        yield f"scores/loss/{row['metric']}-{row['drop']}", f"{row['loss']:.2f}"
        yield f"scores/rise/{row['metric']}-{row['drop']}", f"{row['damage']:.2f}"
    mine = correlations[correlations["other"] == "measured_damage"]
    for row in mine.to_dict("records"):
        if row["metric"] != "measured_damage":
            yield f"scores/agreement/{row['metric']}", tex(row["spearman"], 2)
    pairs = correlations.set_index(["metric", "other"])["spearman"]
    yield "scores/pair/reverse-attenuated", tex(float(pairs["reverse", "attenuated_contribution"]), 4)
    yield "scores/pair/angular-sum", tex(float(pairs["angular_all_tokens", "angular_sum"]), 2)


def _published(results: Results) -> Iterator[tuple[str, Any]]:
    tasks = [row["tasks"] for row in results.published["numbers"] if row.get("tasks")]
    yield "published/tasks", len(tasks[0])
    for row in results.published["numbers"]:
        model = str(row["model"]).split("/")[-1]
        name = str(row.get("recipe") or row.get("metric") or "dense")
        if row["statistic"] == "heal_seconds":
            yield f"published/seconds/{model}/{name}", tex(int(row["value"]))
        elif row["statistic"] == "mean_acc" and row.get("metric") == "reverse" and not row.get("method"):
            share = round(100 * row["share"])
            yield f"published/reverse/{model}/{name}/{share}", f"{row['value']:.4f}"
