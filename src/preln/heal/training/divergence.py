"""Where a step stopped being finite: told by block and site, from the same rows run once more."""

from __future__ import annotations

import torch

from preln.heal.rows.examples import Examples
from preln.heal.training.step import Stepper
from preln.models.finite import first_not_finite


def forward_site(passes: Stepper, rows: Examples) -> str | None:
    """The first module whose output is not finite when ``rows`` are run without gradients.

    Args:
        passes: What ran them. Parts of the model behind stored states only, where states are stored.
        rows: Rows on the CPU; all of them are run, a portion at a time.

    Returns:
        Such as ``block 2, mlp.down_proj``; None where all is finite, or where several processes share the
        work and one of them alone cannot run it.
    """
    if passes.workers.count > 1:
        return None
    for start in range(0, len(rows), passes.portion):
        places = range(start, min(start + passes.portion, len(rows)))
        with torch.no_grad():
            found = first_not_finite(passes.prepared.plain, lambda at=places: passes.losses(rows, at))
        if found is not None:
            return found
    return None


def gradient_site(passes: Stepper, batch: Examples, rows: list[int], step: int) -> str | None:
    """The trained parameter nearest to the loss whose gradient is not finite, by its stored name.

    The gradients are taken once more, since clipping by a norm that is not finite has spoilt all of them.
    """
    if passes.workers.count > 1:
        return None
    parameters = passes.prepared.parameters
    for parameter in parameters.values():
        parameter.grad = None
    passes.gradients(batch, rows, step)
    spoilt = [
        name
        for name, parameter in parameters.items()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    return f"the gradient of {spoilt[-1]}" if spoilt else None
