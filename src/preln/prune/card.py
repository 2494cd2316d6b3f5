"""The model card of a pruned checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import yaml

from preln.models.compact import is_compact
from preln.prune.plan import REMOVE, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _listed(blocks: Iterable[int]) -> str:
    return ", ".join(map(str, blocks)) or "none"


def _title(plan: Plan, source: str) -> str:
    """What the checkpoint is, in one line."""
    halves = len(plan.drop_attention) + len(plan.drop_mlp)
    without = [f"{len(plan.drop)} of {plan.num_blocks} blocks"] if plan.drop else []
    without += [f"{halves} of {2 * plan.num_blocks} branches"] if halves else []
    how = "" if plan.method == REMOVE else f", by {plan.method}"
    return f"{source} without {' and '.join(without)}{how}" if without else f"{source}{how}"


def _what_was_done(plan: Plan, *, compact: bool) -> str:
    """The recipe, and what it saves."""
    if plan.method != REMOVE:
        saved = "" if plan.drop else " All weights keep their shapes: nothing is saved in memory or time."
        return (
            f"`{plan.method}` replaced blocks as `preln.prune.replace` defines it, with the settings and on "
            f"the tokens listed here.{saved}"
        )
    done = "Whole blocks were removed" if plan.drop else "Branches of blocks were removed"
    done += " and nothing was trained afterwards unless a section below says so."
    if compact:
        return f"{done} The removed branches are not stored and not computed."
    if plan.drop_attention or plan.drop_mlp:
        return (
            f"{done} Every removed branch is still there, with its last linear map (weight and bias) exactly "
            "zero, so that it adds nothing: that saves neither memory nor time."
        )
    return done


def model_card(model: PreTrainedModel, plan: Plan, *, licence: str | None = None) -> str:
    """Markdown with front matter: what was removed, counted from 0, by which metric, from which model."""
    header: dict[str, object] = {"library_name": "transformers", "tags": ["preln", "layer-pruning"]}
    if licence:
        header["license"] = licence.lower()
    if plan.model:
        header["base_model"] = plan.model
    parameters = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.is_floating_point())
    source = plan.model or "an unnamed model"
    compact = is_compact(model)
    rows = [
        ("Source", source),
        ("Licence of the source", licence or "unknown: look it up before sharing this checkpoint"),
        ("Method", plan.method),
        *(
            (f"Setting `{k}`", _listed(v) if isinstance(v, tuple) else str(v))
            for k, v in plan.settings.items()
        ),
        ("Format", "compact: loads with preln alone" if compact else "plain: loads with transformers alone"),
        ("Blocks before", str(plan.num_blocks)),
        ("Blocks removed (counted from 0)", _listed(plan.drop)),
        ("Blocks kept, in this order", _listed(plan.keep)),
        ("Attention removed in blocks", _listed(plan.drop_attention)),
        ("MLP removed in blocks", _listed(plan.drop_mlp)),
        ("Chosen by", plan.metric or ("hand" if plan.method == REMOVE else plan.method)),
        ("Protected", plan.protect),
        ("Tokens read (sha256)", plan.tokens or "none"),
        ("Parameters left", f"{parameters:,}"),
        ("of which zero", f"{zeros:,}"),
        ("dtype", str(model.dtype).removeprefix("torch.")),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    loader = "preln" if compact else "plain transformers"
    refused = (
        " Plain transformers was seen to refuse it: it would fill the removed branches with random weights."
        if compact
        else ""
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {_title(plan, source)}

Made by `preln prune`. {_what_was_done(plan, compact=compact)} `plan.yaml` holds the same facts as data.

| | |
|---|---|
{table}

Before this folder took its place, {loader} loaded it, gave the logits of the model in memory, and
generated the same with the key-value cache on and off.{refused}

```python
{_LOAD_COMPACT if compact else _LOAD}
```
"""


_LOAD = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")"""
_LOAD_COMPACT = """import preln

model, tokenizer = preln.load_model("path/to/this/folder", dtype="auto")"""
