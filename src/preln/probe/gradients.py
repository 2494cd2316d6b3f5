"""Parameter gradients by block: the exact norm, and an interval from a random sketch of each batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.probe.sums import interval, multiplicities

_ROWS, _WIDTH = 8, 256
MIN_BATCHES = 4  # resamples of fewer batches are too few to show a spread


def block_parameters(blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The floating-point parameters of every block.

    Raises:
        InputError: A block has none, as in quantised models.
    """
    groups = [[p for p in block.parameters() if p.is_floating_point()] for block in blocks]
    for index, group in enumerate(groups):
        if not group:
            raise InputError(f"block {index}: no floating-point parameters: leave out grad_param")
    return groups


class GradientSums:
    """Reads the gradients that accumulate in ``.grad``.

    A resample of sequence batches needs the norm of ``sum_b c_b g_b``, and keeping every g_b would take one
    copy of the parameters a batch. Kept instead is a linear sketch S g_b with random signs S, whose squared
    norm is that of its argument on average (Achlioptas 2003). A norm of a mean grows under resampling, so
    these intervals lean upwards; they are scaled by the ratio of exact to sketched norm.

    Attributes:
        resampled: After :meth:`rows`, the norm of every block in every bootstrap sample, ``[L, draws]``. The
            samples are the same for all blocks, so orders among blocks can be resampled too.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, sketch: bool, seed: int) -> None:
        self.groups = block_parameters(blocks)
        self.sketch = sketch
        self.targets: list[int] = []
        self.resampled = np.empty((len(self.groups), 0))
        self._running: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._signs: dict[tuple[int, int], Tensor] = {}

    def _sign(self, place: int, rows: int, like: Tensor) -> Tensor:
        # independent within a block; blocks of equal shape share signs, so that one block's worth is stored
        key = (place, rows)
        if key not in self._signs:
            bits = torch.randint(0, 2, (_ROWS, rows), generator=self._generator, dtype=torch.int8)
            self._signs[key] = (2.0 * bits - 1.0) / _ROWS**0.5
        return self._signs[key].to(like.device)

    def after_batch(self, targets: int) -> None:
        """Sketch the sum of gradients so far, after a sequence batch with this many targets."""
        self.targets.append(targets)
        if not (self.sketch and self.groups):
            return
        sketches = []
        for group in self.groups:
            total = torch.zeros(_ROWS, _WIDTH)
            for place, parameter in enumerate(group):
                if parameter.grad is None:
                    continue
                flat = parameter.grad.reshape(-1).float()
                whole = flat.numel() // _WIDTH * _WIDTH
                rows = flat[:whole].view(-1, _WIDTH)
                signs = self._sign(place, len(rows) + 1, flat)
                part = signs[:, :-1] @ rows
                part[:, : flat.numel() - whole] += torch.outer(signs[:, -1], flat[whole:])
                total += part.cpu()
            sketches.append(total.flatten())
        self._running.append(torch.stack(sketches))

    def rows(self, scale: float, *, draws: int, seed: int) -> list[tuple]:
        """Rows of the table: ``|dL/dtheta_l|`` of the mean token loss, and the interval over batches.

        Args:
            scale: The accumulated gradients are those of the mean loss times this factor.
            draws: Number of bootstrap samples of sequence batches.
            seed: Fixes them.
        """
        exact = []
        for group in self.groups:
            square = sum(float(p.grad.double().norm() ** 2 if p.grad.dtype == torch.float64 else
                               torch.linalg.vector_norm(p.grad.float()).double() ** 2)
                         for p in group if p.grad is not None)  # fmt: skip
            exact.append(square**0.5 * scale)
        n = len(self.targets)
        low = high = np.full(len(exact), np.nan)
        self.resampled = np.empty((len(exact), 0))
        if self._running and n > 1 and draws:
            running = torch.stack(self._running, dim=-1).double()
            shares = torch.diff(running, dim=-1, prepend=torch.zeros_like(running[..., :1]))
            counts = multiplicities(n, draws=draws, seed=seed)
            sampled = torch.linalg.vector_norm(shares @ torch.from_numpy(counts), dim=1).numpy()
            weights = np.asarray(self.targets, dtype=np.float64)
            sampled = sampled / (weights @ counts) * weights.sum()
            whole = torch.linalg.vector_norm(running[..., -1], dim=1).numpy()[:, None]
            self.resampled = np.array(exact)[:, None] * sampled / np.maximum(whole, 1e-300)
            low, high = interval(self.resampled)
        return [
            ("grad_param", layer, "block", "mean", value, float(low[layer]), float(high[layer]), n)
            for layer, value in enumerate(exact)
        ]
