"""The names of the measures, what each needs, and which a model allows."""

from __future__ import annotations

from collections.abc import Iterable

from preln.base.errors import InputError
from preln.models import Anatomy

STREAM = {
    "residual_rms": "mean over tokens of |x[l]|/sqrt(d); layer L is the last block's output before the norm",
    "residual_growth": "mean over tokens with x != 0 of |x[l+1]|/|x[l]|",
    "massive_token_share": "share of a sequence's squared norm that its largest token holds",
    "massive_channel_share": "share of a sequence's squared norm that its largest channel holds",
    "effective_rank": "exp of the entropy of a sequence's normalised singular values (Roy, Vetterli 2007)",
}
MOMENTS = {
    "norm_input_rms": "mean over tokens of the root mean square of the norm's input",
    "norm_input_mean": "mean over tokens of the mean of the norm's input over channels",
    "norm_input_variance": "mean over tokens of the biased variance of the norm's input over channels",
    "variance_le_one": "share of tokens whose variance at the norm's input is at most 1",
}
UPDATES = {
    "update_ratio": "mean over tokens with x != 0 of |F|/|x|, F the update of the block or of one half",
    "cosine": "mean over tokens of cos(x, x+F)",
    "update_cosine": "mean over tokens with x, F != 0 of cos(F, x)",
    "block_influence": "mean over tokens of 1 - cos(x, x+F)",
    "block_influence_global": "1 - one cosine over the flattened batch",
}
HIDDEN = {
    "grad_hidden": "|dL/dx[l]| over all tokens, L the mean token loss in nats",
    "first_order_damage": "-<dL/dx[l+1], F>: first-order rise of the mean token loss when F is removed",
}
PARAMETER = {
    "grad_param": "|dL/dtheta| of the block, of a half, or of a group: q, k, v, o, gate, up, down, norms",
    "grad_param_relative": "|dL/dtheta|/|theta| of the same parameters",
    "grad_tail_share": "share of blocks l and later, final norm and head in the squared gradient of all",
}
NORM = {
    "norm_sigma": "mean over tokens of the norm's exact spectral norm with its gain, at its real input",
    "norm_sigma_bound": "mean over tokens of the bound max|gain|/s",
    "norm_sigma_tightness": "mean over tokens of norm_sigma over its bound",
    "norm_sigma_no_gain": "mean over tokens of the norm's spectral norm without its gain",
}
JACOBIAN = {
    "branch_sigma": "sigma(A) of a branch's Jacobian on the whole sequence, from its norm's output",
    "update_sigma": "sigma(J - I) of the block's Jacobian on the whole sequence; at a half, sigma(A G)",
    "block_sigma": "sigma(J) of the block's Jacobian on the whole sequence",
    "block_sigma_min": "smallest Ritz value of J, an upper bound of its smallest singular value",
    "stack_sigma": "sigma of the Jacobian of x[l] -> x[L] on the whole sequence",
}
LENS = {
    "lens_loss": "mean token loss if final norm and head took x[l]: blocks l and later removed",
    "lens_agreement": "share of tokens at which x[l] has the same first choice as the model",
}
GROUPS = {
    "stream": {**STREAM, **MOMENTS},
    "updates": UPDATES,
    "gradients": {**HIDDEN, **PARAMETER},
    "norms": NORM,
    "jacobians": JACOBIAN,
    "lens": LENS,
}
MEASURES = {name: text for group in GROUPS.values() for name, text in group.items()}
DEFAULT = ("stream", "updates", "gradients", "norms")


def _named(measures: Iterable[str]) -> set[str]:
    """The measures meant by names of measures and of groups, or ``all``."""
    wanted: set[str] = set()
    for name in measures:
        if name == "all":
            wanted |= set(MEASURES)
        elif name in GROUPS:
            wanted |= set(GROUPS[name])
        elif name in MEASURES:
            wanted.add(name)
        else:
            raise InputError(
                f"measure {name!r} is unknown: choose from {', '.join(MEASURES)}, "
                f"or from the groups {', '.join(GROUPS)}, all"
            )
    if not wanted:
        raise InputError("no measure asked for: name at least one, or leave the choice open")
    return wanted


def _obstacles(anatomy: Anatomy) -> dict[str, str]:
    """Measures that this model does not allow, with the reason."""
    found = {}
    parts = [anatomy.parts(index) for index in range(anatomy.num_blocks)]
    if not any(part.attention_norm or part.mlp_norm for part in parts):
        reason = f"needs norms in front of the branches, and this model measures as {anatomy.placement}"
        found |= dict.fromkeys([*NORM, *MOMENTS], reason)
    if any(not p.is_floating_point() for block in anatomy.blocks for p in block.parameters()):
        # kernels for quantised weights have no backward, or in evaluation a wrong one
        reason = "needs floating-point weights, and this model's are quantised"
        found |= dict.fromkeys([*HIDDEN, *PARAMETER, *JACOBIAN], reason)
    return found


def choose(measures: Iterable[str] | None, anatomy: Anatomy) -> tuple[set[str], list[str]]:
    """The measures to take and notes on those left out.

    Asked for by its own name, a measure that this model does not allow is refused; by default, or as one of
    a group, it is left out.

    Raises:
        InputError: An unknown name, or a measure asked for that the model does not allow.
    """
    asked = list(DEFAULT if measures is None else measures)
    wanted, obstacles = _named(asked), _obstacles(anatomy)
    for name in asked:
        if name in obstacles:
            raise InputError(f"{name}: {obstacles[name]}: ask for other measures")
    notes: dict[str, list[str]] = {}
    for name in MEASURES:
        if name in wanted & set(obstacles):
            notes.setdefault(obstacles[name], []).append(name)
    return wanted - set(obstacles), [f"left out {', '.join(n)}: {reason}" for reason, n in notes.items()]
