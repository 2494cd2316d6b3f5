"""Pruned models of one criterion and one size that a study tells apart by their step's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Records = tuple[dict[str, Any], ...]


def told_apart(prunes: Sequence[dict[str, Any]], heals: Sequence[dict[str, Any]]) -> tuple[Records, Records]:
    """Records of prune and heal steps whose metric says which variant of a pruned model they are of.

    A study that prunes with several protections or methods names its steps
    ``prune-METRIC-SIZE[-VARIANT]``; the variant joins the metric in brackets.

    >>> prunes = [{"id": "prune-reverse-8", "metric": "reverse"},
    ...           {"id": "prune-reverse-8-uidl", "metric": "reverse"}]
    >>> heals = [{"id": "heal-reverse-8-uidl-lora", "metric": "reverse"}]
    >>> first, second = told_apart(prunes, heals)
    >>> [record["metric"] for record in (*first, *second)]
    ['reverse', 'reverse (uidl)', 'reverse (uidl)']
    """
    named: dict[str, str] = {}
    for prune in prunes:
        label, metric = str(prune["id"]).removeprefix("prune-"), str(prune["metric"])
        variant = label.removeprefix(f"{metric}-").partition("-")[2] if label.startswith(f"{metric}-") else ""
        named[label] = f"{metric} ({variant})" if variant else metric
    healed = []
    for heal in heals:
        name = str(heal["id"]).removeprefix("heal-")
        label = max((label for label in named if name.startswith(f"{label}-")), key=len, default="")
        healed.append(heal | {"metric": named.get(label, heal["metric"])})
    first = (prune | {"metric": named[str(prune["id"]).removeprefix("prune-")]} for prune in prunes)
    return tuple(first), tuple(healed)
