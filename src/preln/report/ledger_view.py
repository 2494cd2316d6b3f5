"""The ledger as the page shows it: plain data for the template, no markup."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from preln.report.load import Run
from preln.report.typeset import typeset
from preln.report.views import slug, status_class


def _rank(status: str) -> int:
    order = ("unsupported", "inconclusive", "untested", "supported")
    return order.index(status) if status in order else len(order)


def ledger_views(run: Run, prefix: str) -> list[dict[str, Any]]:
    """The claims, refuted ones first, then in the ledger's order; counterexamples apart from the rest."""
    known = {str(claim["id"]) for claim in run.claims}
    verdicts: dict[str, str] = {}
    for (
        verdict
    ) in run.verdicts:  # of several models that decide a hypothesis, the least favourable one counts
        found = [str(verdict["status"]), *filter(None, [verdicts.get(str(verdict["id"]))])]
        verdicts[str(verdict["id"])] = min(found, key=_rank)
    entries = []
    for claim in run.claims:
        evidence = [item for item in claim.get("evidence") or [] if isinstance(item, dict)]
        against = [item for item in evidence if item.get("kind") == "counterexample"]
        kind = claim.get("kind", "theorem")
        # the run's own verdict is what a hypothesis' status means on this page
        status = (
            verdicts.get(str(claim["id"]), str(claim["status"]))
            if kind == "hypothesis"
            else str(claim["status"])
        )
        corrections = sorted({str(d) for d in (_detail(item).get("corrected_by") for item in against) if d})
        entries.append(
            {
                **{key: str(claim.get(key) or "") for key in ("id", "title", "source")},
                "statement": typeset(str(claim.get("statement") or "")),
                **{"anchor": f"{prefix}-claim-{slug(str(claim['id']))}", "kind": str(kind), "status": status},
                **{
                    "class": status_class(status),
                    "assumptions": [typeset(str(a)) for a in claim.get("assumptions") or []],
                },
                **{"uses": _links(claim.get("uses") or [], known, prefix)},
                **{"corrected": _links(corrections, known, prefix)},
                "kinds": sorted({str(item.get("kind")) for item in evidence}),
                "counterexamples": [_instance(item) for item in against],
                "evidence": [
                    {
                        "kind": str(e.get("kind")),
                        "outcome": str(e.get("outcome")),
                        "rows": list(flatten(_detail(e))),
                    }
                    for e in evidence
                    if e.get("kind") != "counterexample"
                ],
            }
        )
    return sorted(entries, key=lambda entry: entry["status"] != "refuted")


def _instance(item: dict[str, Any]) -> list[tuple[str, str]]:
    """A counterexample's rows: what was checked on which numbers, what came out; the controls left out."""
    rows = flatten(_detail(item), skip=("corrected_by", "negative_controls", "claim_on_instance"))
    return [(path.removeprefix("instance.").removeprefix("values."), text) for path, text in rows]


def flatten(value: Any, path: str = "", skip: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Nested data as rows of (dotted path, text); short lists of plain values stay on one row."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in skip:
                yield from flatten(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for i, item in enumerate(value, 1):
            yield from flatten(item, f"{path} {i}")
    elif isinstance(value, list):
        yield path, ", ".join("–" if item is None else str(item) for item in value) or "–"
    else:
        yield path, "–" if value is None else str(value)


def _detail(item: dict[str, Any]) -> dict[str, Any]:
    detail = item.get("detail")
    return detail if isinstance(detail, dict) else {"detail": detail} if detail else {}


def _links(ids: list[Any], known: set[str], prefix: str) -> list[dict[str, Any]]:
    return [
        {"text": str(i), "href": f"#{prefix}-claim-{slug(str(i))}" if str(i) in known else None} for i in ids
    ]
