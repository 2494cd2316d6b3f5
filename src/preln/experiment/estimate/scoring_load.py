"""What criteria ask of a machine: the passes that they share, and those of the ones that share none."""

from __future__ import annotations

from dataclasses import replace

from preln.experiment.estimate.workload import Load, Shape, Windows, backward, forward, left_out

JACOBIAN = 40.0  # passes of a block that its largest singular value takes (derived from its iterations)


def gathering(shape: Shape, rows: Windows, needs: frozenset[str]) -> tuple[Load, float]:
    """The passes that criteria share (:func:`preln.prune.evidence.gather`), and the memory they take."""
    if not needs:
        return Load(), 0.0
    back = bool(needs & {"gradients", "weight_gradients"})
    leave_out = "left_out" in needs
    load = forward(shape, rows, heads=float(back or leave_out))
    memory = (shape.blocks + 1) * rows.together * shape.hidden * shape.size
    if back:
        weights = "weight_gradients" in needs
        load += backward(shape, rows, weights=weights)
        memory += rows.together * shape.blocks * shape.wide * shape.size
        memory += shape.blocks * shape.held * shape.size * weights
    if leave_out:
        load += left_out(shape, rows)
    return load, memory


def alone(name: str, needs: frozenset[str], shape: Shape, rows: Windows, size: int) -> tuple[Load, float]:
    """The passes of a criterion that shares none, by what it does.

    Iterative ones score a smaller model in every round. Greedy removal tries every block that is left, round
    after round. ``taylor_by_sequence`` goes back for every sequence, and Jacobians take some forty passes of
    every block on two sequences.
    """
    step = name.partition("@")[2]
    if step:
        load, memory, left = Load(), 0.0, size
        while left:
            more, held = gathering(shape.without(size - left), rows, needs)
            load, memory = load + more, max(memory, held)
            left -= min(int(step), left)
        return load, memory
    if "jacobians" in needs:
        two = Windows(min(2, rows.count), rows.length, 1)
        return forward(shape, two, blocks=JACOBIAN * shape.blocks, heads=0.0), 8 * two.length * shape.wide * 4
    if "left_out" in needs:
        load = forward(shape, rows, heads=0.0)
        for gone in range(size):
            load += left_out(shape.without(gone), rows)
        return load, (shape.blocks + 1) * rows.tokens * shape.hidden * shape.size
    return gathering(shape, replace(rows, batch=1), needs)
