"""Which parameters belong together: attention, MLP, and the linear maps by the names the field gives them."""

from __future__ import annotations

import re

from torch import nn

from preln.models import Anatomy

# first match wins; the text is a parameter's name inside its block
_ATTENTION = (
    ("qkv", r"qkv|query_key_value|c_attn|wqkv"),
    ("q", r"(^|[._])(q|wq|query)(_|\.|$)|q_a_proj|q_b_proj"),
    ("k", r"(^|[._])(k|wk|key)(_|\.|$)"),
    ("v", r"(^|[._])(v|wv|value)(_|\.|$)"),
    ("o", r"(^|[._])(o|wo|out|c)(_proj|_lin|\.|$)|dense"),
)
_MLP = (
    ("router", r"router|(^|\.)gate(\.weight|\.bias|\.wg)|shared_expert_gate"),
    ("gate_up", r"gate_up"),
    ("gate", r"gate|(^|\.)w1(\.|$)"),
    ("down", r"down|fc2|fc_out|(^|\.)w2(\.|$)|4h_to_h|c_proj|output\.dense"),
    ("up", r"up_|up\.|fc1|fc_in|c_fc|(^|\.)w3(\.|$)|h_to_4h|intermediate"),
)
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)|_ln(\.|$)")


def group_of(name: str, *, attention: bool) -> str:
    """The group of a parameter, by its name inside the attention module, or else inside the block.

    One of ``q``, ``k``, ``v``, ``o`` or ``qkv`` where these are one matrix; ``gate``, ``up``, ``down`` or
    ``gate_up``; ``router``; ``norms``. What fits none keeps the name of its module.

    >>> group_of("q_proj.weight", attention=True), group_of("mlp.c_proj.weight", attention=False)
    ('q', 'down')
    """
    lowered = name.lower()
    if _NORM.search(lowered):
        return "norms"
    for group, pattern in _ATTENTION if attention else _MLP:
        if re.search(pattern, lowered):
            return group
    parts = lowered.split(".")
    return parts[-2] if len(parts) > 1 else parts[-1]


def _half(group: str, *, known: bool) -> str:
    """The half of a parameter outside the attention; without a known attention nothing is called an MLP."""
    if group == "norms":
        return "norms"
    return "mlp" if known else "other"


def parameter_groups(anatomy: Anatomy) -> list[tuple[int, str, str, list[nn.Parameter]]]:
    """(layer, half, group, parameters) of every block, then of the final norm and the head at layer L.

    The half is ``attention``, ``mlp`` or, for a norm beside both, ``norms``; outside the blocks it is
    ``final_norm`` or ``head``, and the group is the same. The head of a tied model is the embedding's
    table: what it receives here is the gradient through the logits only.
    """
    rows = []
    for layer, block in enumerate(anatomy.blocks):
        attention = anatomy.parts(layer).attention
        inside = {id(p): n for n, p in attention.named_parameters()} if attention is not None else {}
        found: dict[tuple[str, str], list[nn.Parameter]] = {}
        for name, parameter in block.named_parameters():
            if not parameter.is_floating_point():
                continue
            own = inside.get(id(parameter))
            group = group_of(own or name, attention=own is not None)
            half = "attention" if own is not None else _half(group, known=attention is not None)
            found.setdefault((half, group), []).append(parameter)
        rows.extend((layer, half, group, members) for (half, group), members in found.items())
    seen = {id(p) for *_, members in rows for p in members}
    for site, module in (("final_norm", anatomy.final_norm), ("head", anatomy.head)):
        held = [] if module is None else list(module.parameters())
        members = [p for p in held if p.is_floating_point() and id(p) not in seen]
        if members:
            rows.append((anatomy.num_blocks, site, site, members))
    return rows
