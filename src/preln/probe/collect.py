"""The visitor that reduces residual states and their gradients to per-sequence sums, on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models import Anatomy
from preln.models.residual import Tokens, change, check_finite, on_blocks, on_inputs, wide
from preln.probe.masked import TokenSums
from preln.probe.measures import MOMENTS, NORM
from preln.probe.norms import NormLaw, recognise
from preln.probe.stream import Stream
from preln.probe.sums import Sums

# placements in which the MLP's norm reads the residual stream between the two halves
HALVES = ("pre-ln", "sandwich")


def norms_of(anatomy: Anatomy) -> dict[tuple[int, str], nn.Module]:
    """The norms in front of the branches and of the head, by (layer, site); a shared one appears once."""
    found: dict[tuple[int, str], nn.Module] = {}
    for index in range(anatomy.num_blocks):
        parts = anatomy.parts(index)
        if parts.attention_norm is not None:
            found[index, "attention"] = parts.attention_norm
        if parts.mlp_norm is not None and parts.mlp_norm is not parts.attention_norm:
            found[index, "mlp"] = parts.mlp_norm
    if anatomy.final_norm is not None:
        found[anatomy.num_blocks, "final_norm"] = anatomy.final_norm
    return found


class Collector:
    """Attached to a model, turns each forward and backward pass of a sequence batch into rows of sums.

    Args:
        anatomy: The model's anatomy.
        wanted: Names of measures.
        sums: Where the sums go.
        width: Hidden size, on which norms are recognised.

    Attributes:
        after: What to call with each sequence batch and its states x[0] … x[L] once its backward pass is
            over. The states of one batch are kept for it, and only if there is something to call.

    Raises:
        InputError: A norm of the model computes neither RMSNorm nor LayerNorm, and its sigma is wanted.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        wanted: set[str],
        sums: Sums,
        *,
        width: int,
    ) -> None:
        self.anatomy, self.wanted, self.sums = anatomy, wanted, sums
        self.after: list[Callable[[Tokens, list[Tensor]], None]] = []
        self._states: list[Tensor] = []
        self._watching = False
        self.tokens = TokenSums(sums, wanted)
        self.stream = Stream(self.tokens)
        self.leaf: Tensor | None = None
        self._lengths: Tensor | None = None
        self._middle: dict[int, Tensor] = {}
        self._norms = norms_of(anatomy) if wanted & {*NORM, *MOMENTS} else {}
        self._laws: dict[tuple[int, str], NormLaw] = {}
        if wanted & set(NORM):
            self._laws = {key: recognise(norm, width) for key, norm in self._norms.items()}
        halves = anatomy.placement in HALVES and wanted & {
            "update_ratio", "cosine", "update_cosine", "first_order_damage"
        }  # fmt: skip
        self._halves = {
            index: norm
            for index in range(anatomy.num_blocks)
            if halves and (norm := anatomy.parts(index).mlp_norm) is not None
        }

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
        self.tokens.start(tokens)
        self._shape, self._real = tokens.ids.shape, tokens.real
        self._loss_scale = loss_scale
        self._watching = True
        self._lengths = None
        self._middle.clear()
        self._states.clear()

    def finish(self) -> None:
        """After the backward pass: the gradient at x[0], what needs all states, and off with the sums."""
        if self.leaf is not None and "grad_hidden" in self.wanted and self.leaf.grad is not None:
            self._gradient(0, self.leaf.grad)
        self.leaf = None
        # what follows may run parts of the model again, and that is not to be measured
        self._watching = False
        for reduce in self.after:
            reduce(self.tokens.tokens, self._states)
        self._states.clear()
        self.sums.flush()

    def _leaf(self, x: Tensor) -> None:
        self.leaf = x

    def _enter_mlp(self, layer: int, h: Tensor) -> None:
        self._middle[layer] = h

    @torch.no_grad()
    def _norm(self, key: tuple[int, str], h: Tensor) -> None:
        if not self._watching:
            return
        layer, site = key
        place = f"block {layer}, attention" if site == "mlp" else f"the input of block {layer}"
        self.stream.norm(layer, site, h, self._laws.get(key), place)

    def _block(self, layer: int, x: Tensor, y: Tensor) -> None:
        middle = self._middle.pop(layer, None)
        with torch.no_grad():
            half = None if middle is None else middle.detach().view(x.shape)
            self._reduce(layer, x.detach(), y.detach(), half)
        if y.requires_grad and self.wanted & {"grad_hidden", "first_order_damage"}:
            # detached: a hook that holds its own tensor is a ring through the graph, which is never freed
            before, after = x.detach(), y.detach()
            between = None if middle is None else middle.detach()
            y.register_hook(lambda g: self._at_output(layer, g, before, after, between))
            if middle is not None and between is not None and middle.requires_grad:
                middle.register_hook(lambda g: self._damage(layer, "attention", g, before, between))

    def _reduce(self, layer: int, x: Tensor, y: Tensor, middle: Tensor | None) -> None:
        real = self._real.to(y.device)
        before = None if self._lengths is None else self._lengths.to(y.device)
        moved = change(x, y, before)
        if layer == 0:
            check_finite(moved.before, real, "embedding: the input of block 0")
            self.stream.state(0, wide(x), moved.before)
        half = None if middle is None else change(x, middle, moved.before)
        if half is not None:
            check_finite(half.after, real, f"block {layer}, attention")
        check_finite(moved.after, real, f"block {layer}, {'block' if half is None else 'mlp'}")
        self.stream.state(layer + 1, wide(y), moved.after)
        self.stream.update(layer, "block", moved)
        if half is not None and middle is not None:
            self.stream.update(layer, "attention", half)
            self.stream.update(layer, "mlp", change(middle, y, half.after))
        self._lengths = moved.after
        if self.after:
            self._states.extend([x, y] if layer == 0 else [y])

    @torch.no_grad()
    def _gradient(self, layer: int, g: Tensor) -> None:
        square = wide(g).square().sum(-1)
        if not bool(torch.isfinite(square).all()):
            raise InputError(f"gradient at x[{layer}]: values are not finite: use a wider --dtype")
        self.tokens.total("grad_hidden", layer, "block", square, rule="root", scale=self._loss_scale**2)

    @torch.no_grad()
    def _damage(self, layer: int, site: str, g: Tensor, before: Tensor, after: Tensor) -> None:
        if "first_order_damage" not in self.wanted:
            return
        shape = (*self._shape, -1)  # some blocks fold their tokens into one axis for the MLP
        update = wide(after).view(shape) - wide(before).view(shape)
        per_token = -torch.linalg.vecdot(wide(g).view(shape), update)
        self.tokens.total("first_order_damage", layer, site, per_token, rule="ratio", scale=self._loss_scale)

    def _at_output(self, layer: int, g: Tensor, x: Tensor, y: Tensor, middle: Tensor | None) -> None:
        if "grad_hidden" in self.wanted:
            self._gradient(layer + 1, g)
        self._damage(layer, "block", g, x, y)
        if middle is not None:
            self._damage(layer, "mlp", g, middle, y)
