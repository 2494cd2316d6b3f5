"""The names of the measures, what each needs, and which a model allows."""

from __future__ import annotations

from collections.abc import Iterable

from preln.base.errors import InputError
from preln.models import Anatomy, require_pre_ln

STREAM = ("residual_rms", "update_ratio", "cosine", "block_influence", "block_influence_global")
NORM = ("norm_sigma", "norm_sigma_bound", "norm_sigma_no_gain", "variance_le_one")
GRADIENT = ("grad_hidden", "first_order_damage")
PARAMETER = ("grad_param",)
MEASURES = {
    "residual_rms": "mean over tokens of |x[l]|/sqrt(d); layer L is the last block's output before the norm",
    "update_ratio": "mean over tokens with x != 0 of |F|/|x|, F the update of the block or of one half",
    "cosine": "mean over tokens of cos(x, x+F)",
    "block_influence": "mean over tokens of 1 - cos(x, x+F)",
    "block_influence_global": "1 - one cosine over the flattened batch",
    "norm_sigma": "mean over tokens of the norm's exact spectral norm with its gain, at its real input",
    "norm_sigma_bound": "mean over tokens of the bound max|gain|/s",
    "norm_sigma_no_gain": "mean over tokens of the norm's spectral norm without its gain",
    "variance_le_one": "share of tokens whose variance at the norm's input is at most 1",
    "grad_hidden": "|dL/dx[l]| over all tokens, L the mean token loss in nats",
    "first_order_damage": "-<dL/dx[l+1], F>: first-order rise of the mean token loss when F is removed",
    "grad_param": "|dL/dtheta| over all parameters of the block",
}


def choose(measures: Iterable[str] | None, anatomy: Anatomy) -> tuple[set[str], list[str]]:
    """The measures to take and notes on those left out.

    Asked for by name, a measure that this model does not allow is refused; by default it is left out.

    Raises:
        InputError: An unknown name, or a Pre-LN measure asked for on another placement.
    """
    if measures is None:
        try:
            require_pre_ln(anatomy, "the Jacobian norms of the blocks' norms")
        except InputError as error:
            return set(MEASURES) - set(NORM), [f"left out {', '.join(NORM)}: {error}"]
        return set(MEASURES), []
    wanted = set(measures)
    unknown = sorted(wanted - set(MEASURES))
    if unknown:
        raise InputError(f"measure {unknown[0]!r} is unknown: choose from {', '.join(MEASURES)}")
    if not wanted:
        raise InputError("no measure asked for: name at least one, or leave the choice open")
    for name in sorted(wanted & set(NORM)):
        require_pre_ln(anatomy, name)
    return wanted, []
