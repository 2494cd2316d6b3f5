"""The visitor that reduces residual states and their gradients to per-sequence sums, on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.models import Anatomy
from preln.models.residual import Change, Tokens, change, check_finite, on_blocks, on_inputs, wide
from preln.probe.norms import NormLaw, recognise
from preln.probe.pairs import PairSums
from preln.probe.sums import Sums

STATISTICS = ("mean", "mean_without_first_token")


class Collector:
    """Attached to a model, turns each forward and backward pass of a sequence batch into rows of sums.

    Args:
        anatomy: The model's anatomy.
        wanted: Names of measures.
        sums: Where the sums go.
        pairs: Where residual states go for angular distances, or None.
        width: Hidden size, on which norms are recognised.

    Raises:
        InputError: A norm of the model computes neither RMSNorm nor LayerNorm, and norm measures are wanted.
    """

    def __init__(
        self, anatomy: Anatomy, wanted: set[str], sums: Sums, pairs: PairSums | None, *, width: int
    ) -> None:
        self.anatomy, self.wanted, self.sums, self.pairs = anatomy, wanted, sums, pairs
        self.leaf: Tensor | None = None
        self.loss_scale = 1.0
        self._lengths: Tensor | None = None
        self._middle: dict[int, Tensor] = {}
        self._norms = self._find_norms() if wanted & {"norm_sigma", "norm_sigma_bound", "norm_sigma_no_gain",
                                                      "variance_le_one"} else {}  # fmt: skip
        self._laws: dict[tuple[int, str], NormLaw] = {k: recognise(m, width) for k, m in self._norms.items()}
        halves = anatomy.placement == "pre-ln" and wanted & {"update_ratio", "cosine", "first_order_damage"}
        self._halves = {
            index: norm
            for index in range(anatomy.num_blocks)
            if halves and (norm := anatomy.parts(index).mlp_norm) is not None
        }

    def _find_norms(self) -> dict:
        found = {}
        for index in range(self.anatomy.num_blocks):
            parts = self.anatomy.parts(index)
            if parts.attention_norm is not None:
                found[index, "attention"] = parts.attention_norm
            if parts.mlp_norm is not None and parts.mlp_norm is not parts.attention_norm:
                found[index, "mlp"] = parts.mlp_norm
        if self.anatomy.final_norm is not None:
            found[self.anatomy.num_blocks, "final_norm"] = self.anatomy.final_norm
        return found

    @contextmanager
    def attached(self, *, gradients: bool) -> Iterator[None]:
        """Hooks on the model for as long as the context lasts."""
        with ExitStack() as stack:
            stack.enter_context(
                on_blocks(self.anatomy.blocks, self._block, leaf=self._leaf if gradients else None)
            )
            stack.enter_context(on_inputs(self._halves, self._enter_mlp))
            stack.enter_context(on_inputs(self._norms, self._norm))
            yield

    def start(self, tokens: Tokens, loss_scale: float) -> None:
        """Prepare for a sequence batch; ``loss_scale`` times its loss is the sum of token losses."""
        self.tokens, self.loss_scale = tokens, loss_scale
        masks = torch.stack([tokens.real, tokens.real & ~tokens.first])
        self._masks, self._counts = masks, masks.sum(-1).double()
        self._targets = tokens.targets.sum(-1).double()
        self._lengths = None
        self._middle.clear()

    def finish(self) -> None:
        """After the backward pass: the gradient at x[0], the pairs, and off the device with the sums."""
        if self.leaf is not None and "grad_hidden" in self.wanted and self.leaf.grad is not None:
            self._gradient(0, self.leaf.grad)
        self.leaf = None
        if self.pairs is not None:
            self.pairs.flush(self.tokens)
        self.sums.flush()

    def _leaf(self, x: Tensor) -> None:
        self.leaf = x

    def _enter_mlp(self, layer: int, h: Tensor) -> None:
        self._middle[layer] = h

    def _mean(
        self, measure: str, layer: int, site: str, values: Tensor, *, where: Tensor | None = None
    ) -> None:
        """Add the sums for a mean over the real tokens, or over those of them at which ``where`` holds."""
        if measure not in self.wanted:
            return
        masks, counts = self._masks.to(values.device), self._counts.to(values.device)
        if where is not None:
            masks = masks & where
            counts = masks.sum(-1).double()
        totals = torch.where(masks, values, 0.0).sum(-1, dtype=torch.float64)
        for statistic, total, count in zip(STATISTICS, totals, counts, strict=True):
            self.sums.add((measure, layer, site, statistic), "ratio", total, count)

    @torch.no_grad()
    def _norm(self, key: tuple[int, str], h: Tensor) -> None:
        h, law = wide(h.detach()).view(*self.tokens.ids.shape, -1), self._laws[key]
        layer, site = key
        # a block that attention broke is found here, before the formula meets the values
        place = f"block {layer}, attention" if site == "mlp" else f"the input of block {layer}"
        check_finite(torch.linalg.vector_norm(h, dim=-1), self.tokens.real.to(h.device), place)
        if "norm_sigma" in self.wanted:
            self._mean("norm_sigma", *key, law.sigma(h))
        if "norm_sigma_no_gain" in self.wanted:
            self._mean("norm_sigma_no_gain", *key, law.sigma(h, gain=False))
        if "norm_sigma_bound" in self.wanted:
            self._mean("norm_sigma_bound", *key, law.bound(h))
        if "variance_le_one" in self.wanted:
            self._mean("variance_le_one", *key, (h.var(dim=-1, unbiased=False) <= 1.0).to(h.dtype))

    def _update(self, layer: int, site: str, moved: Change) -> None:
        # a zero vector (the embedding of a padding token used as a separator) has no ratio
        self._mean("update_ratio", layer, site, moved.update / moved.before, where=moved.before > 0)
        self._mean("cosine", layer, site, 1.0 - moved.gap)

    def _block(self, layer: int, x: Tensor, y: Tensor) -> None:
        middle = self._middle.pop(layer, None)
        with torch.no_grad():
            half = None if middle is None else middle.detach().view(x.shape)
            self._stream(layer, x.detach(), y.detach(), half)
        if y.requires_grad and self.wanted & {"grad_hidden", "first_order_damage"}:
            y.register_hook(lambda g: self._at_output(layer, g, x, y, middle))
            if middle is not None and middle.requires_grad:
                middle.register_hook(lambda g: self._damage(layer, "attention", g, x, middle))

    def _stream(self, layer: int, x: Tensor, y: Tensor, middle: Tensor | None) -> None:
        real, root = self.tokens.real.to(y.device), x.shape[-1] ** 0.5
        before = None if self._lengths is None else self._lengths.to(y.device)
        moved = change(x, y, before)
        if layer == 0:
            check_finite(moved.before, real, "embedding: the input of block 0")
            self._mean("residual_rms", 0, "block", moved.before / root)
        half = None if middle is None else change(x, middle, moved.before)
        if half is not None:
            check_finite(half.after, real, f"block {layer}, attention")
        check_finite(moved.after, real, f"block {layer}, {'block' if half is None else 'mlp'}")
        self._mean("residual_rms", layer + 1, "block", moved.after / root)
        self._update(layer, "block", moved)
        self._mean("block_influence", layer, "block", moved.gap)
        if "block_influence_global" in self.wanted:
            for statistic, mask in zip(STATISTICS, self._masks.to(y.device), strict=True):
                key = ("block_influence_global", layer, "block", statistic)
                self.sums.add(key, "global_gap", *moved.squares(mask))
        if half is not None and middle is not None:
            self._update(layer, "attention", half)
            self._update(layer, "mlp", change(middle, y, half.after))
        self._lengths = moved.after
        if self.pairs is not None:
            self.pairs.states.extend([x, y] if layer == 0 else [y])

    @torch.no_grad()
    def _gradient(self, layer: int, g: Tensor) -> None:
        square = wide(g).square().sum(-1)
        if not bool(torch.isfinite(square).all()):
            raise InputError(f"gradient at x[{layer}]: values are not finite: use a wider --dtype")
        for statistic, mask in zip(STATISTICS, self._masks.to(g.device), strict=True):
            total = torch.where(mask, square, 0.0).sum(-1, dtype=torch.float64) * self.loss_scale**2
            self.sums.add(
                ("grad_hidden", layer, "block", statistic), "root", total, self._targets.to(g.device)
            )

    @torch.no_grad()
    def _damage(self, layer: int, site: str, g: Tensor, before: Tensor, after: Tensor) -> None:
        if "first_order_damage" not in self.wanted:
            return
        shape = (*self.tokens.ids.shape, -1)  # some blocks fold their tokens into one axis for the MLP
        update = wide(after).view(shape) - wide(before).view(shape)
        per_token = -(wide(g).view(shape) * update).sum(-1)
        for statistic, mask in zip(STATISTICS, self._masks.to(g.device), strict=True):
            total = torch.where(mask, per_token, 0.0).sum(-1, dtype=torch.float64) * self.loss_scale
            key = ("first_order_damage", layer, site, statistic)
            self.sums.add(key, "ratio", total, self._targets.to(g.device))

    def _at_output(self, layer: int, g: Tensor, x: Tensor, y: Tensor, middle: Tensor | None) -> None:
        if "grad_hidden" in self.wanted:
            self._gradient(layer + 1, g)
        self._damage(layer, "block", g, x, y)
        if middle is not None:
            self._damage(layer, "mlp", g, middle, y)
