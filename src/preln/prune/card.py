"""The model card of a pruned checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from preln.prune.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_card(model: PreTrainedModel, plan: Plan, *, licence: str | None = None) -> str:
    """Markdown with front matter: what was removed, counted from 0, by which metric, from which model."""
    header: dict[str, object] = {"library_name": "transformers", "tags": ["preln", "layer-pruning"]}
    if licence:
        header["license"] = licence.lower()
    if plan.model:
        header["base_model"] = plan.model
    parameters = sum(p.numel() for p in model.parameters())
    source = plan.model or "an unnamed model"
    rows = [
        ("Source", source),
        ("Licence of the source", licence or "unknown: look it up before sharing this checkpoint"),
        ("Blocks before", str(plan.num_blocks)),
        ("Blocks removed (counted from 0)", ", ".join(map(str, plan.drop))),
        ("Blocks kept, in this order", ", ".join(map(str, plan.keep))),
        ("Chosen by", plan.metric or "hand"),
        ("Protected", plan.protect),
        ("Tokens scored on (sha256)", plan.tokens or "none"),
        ("Parameters left", f"{parameters:,}"),
        ("dtype", str(model.dtype).removeprefix("torch.")),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {source} without {len(plan.drop)} of {plan.num_blocks} blocks

Made by `preln prune`: whole blocks were removed and nothing was trained afterwards unless a section below
says so. `plan.yaml` holds the same facts, with the scores, as data.

| | |
|---|---|
{table}

Before this folder took its place, plain transformers loaded it, gave the logits of the model in memory, and
generated the same with the key-value cache on and off.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""
