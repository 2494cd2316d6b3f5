"""Statements about trained models: measured, never proved; a study gives each a verdict."""

from __future__ import annotations

from preln.theory.claims import Evidence, claim

R = "Reassessing Layer Pruning in LLMs"
U = "The Unreasonable Ineffectiveness of the Deeper Layers"

STATEMENTS = {
    "HYP-ATTEN-HIDDEN": (R, "Hidden-state gradients attenuate", "|dL/dx_l| falls with depth."),
    "HYP-ATTEN-PARAM": (
        R,
        "Parameter gradients attenuate",
        "|dL/dtheta_l| falls with depth (also: without the last two blocks).",
    ),
    "HYP-SIGMA": (
        R,
        "Variance above 1",
        "sigma^2 > 1 at every norm's input; share of tokens that violate it, by layer.",
    ),
    "HYP-B-LT1": (
        R,
        "Norms contract",
        "sigma of the norm's Jacobian < 1: without gain, and with the learned gain.",
    ),
    "HYP-IDENTITY": (
        R,
        "Deep blocks near the identity",
        "Deep blocks' Jacobians are near the identity: sigma(J - I) falls with depth.",
    ),
    "HYP-PREDICTS": (
        "own",
        "Attenuation predicts damage",
        "Attenuated contribution, and first-order damage, rank the measured damage of removing each block.",
    ),
    "HYP-REVERSE-RAW": (
        R,
        "Reverse order wins before healing",
        "Before healing, reverse order loses least at 25 % (and at 50 %) against every other metric.",
    ),
    "HYP-REVERSE-HEALED": (
        R,
        "Reverse order wins after healing",
        "After healing, too, reverse order loses least at 25 % (and at 50 %) against every other metric.",
    ),
    "HYP-LAST": (U, "The last block must stay", "The last block is the one deep block that must stay."),
    "HYP-HALF": (
        U,
        "Half the deep blocks can go",
        "A large share of the deep blocks (up to half) can go with little loss after healing; where "
        "accuracy collapses.",
    ),
    "HYP-SIMILARITY": (
        U,
        "Deep blocks are alike",
        "Deep blocks are more alike than shallow ones, the last excepted.",
    ),
    "HYP-PARTIAL": (
        R,
        "Partial-3 beats LoRA",
        "Partial-3 beats LoRA at the published learning rate, at equal tokens.",
    ),
    "HYP-PARTIAL-FAIR": (
        "own",
        "Partial-3 against a tuned LoRA",
        "Partial-3 still beats LoRA when LoRA's learning rate is swept, at equal tokens and at equal time.",
    ),
    "HYP-TAIL-ORDER": (R, "More tail heals better", "Healed quality: head < +1 < +2 < +3."),
    "HYP-QLORA": (R, "QLoRA against LoRA", "QLoRA is worse and slower than LoRA."),
    "HYP-HEAL-COST": (
        R,
        "Cost of healing",
        "Partial-3 takes less time than LoRA at about the same memory.",
    ),
    "HYP-TAIL-SHIFT": (
        R,
        "The gradient moves to the tail",
        "After pruning the tail, the last remaining blocks and the head carry more of the gradient than "
        "before.",
    ),
    "HYP-PLACEMENT": (
        R + ", its stated limitation",
        "Placement of the norm decides",
        "Attenuation and prunable depth follow the norm's placement: small models trained from scratch "
        "that differ only in it (Pre-LN, Post-LN, sandwich, scaled).",
    ),
    "HYP-REASONING": (
        U + ", its reviewers",
        "Reasoning suffers first",
        "Knowledge questions survive pruning better than multi-step reasoning and long generation.",
    ),
}


def _unmeasured() -> list[Evidence]:
    """Return no evidence: evidence comes from a study."""
    return []


for _id, (_source, _title, _statement) in STATEMENTS.items():
    claim(_id, kind="hypothesis", title=_title, statement=_statement, source=_source, expect="untested")(
        _unmeasured
    )
