"""What flows between the blocks: hooks that hand x[l] and x[l+1] to a visitor as the model runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.models.loss import check_length, losses_from_logits, target_mask
from preln.models.structure import hidden_of


@dataclass(frozen=True)
class Tokens:
    """Token ids ``[n, t]``, which of them are real (not padding), and which next-token targets count."""

    ids: Int[Tensor, "n t"]
    real: Bool[Tensor, "n t"]
    padded: bool

    @property
    def targets(self) -> Bool[Tensor, "n t-1"]:
        """Targets whose token and predecessor are both real."""
        return target_mask(self.ids, self.real.long())

    @property
    def first(self) -> Bool[Tensor, "n t"]:
        """The first real token of every sequence."""
        return self.real & (self.real.cumsum(1) == 1)

    @property
    def last(self) -> Int[Tensor, " n"]:
        """Position of the last real token of every sequence."""
        places = torch.arange(self.real.shape[1], device=self.real.device)
        return torch.where(self.real, places, -1).max(dim=1).values

    def batches(self, size: int, device: torch.device | str | None = None) -> Iterator[Tokens]:
        """Consecutive sequence batches of at most ``size``, moved to ``device``."""
        if size < 1:
            raise InputError(f"batch size {size}: use at least 1")
        for i in range(0, self.ids.shape[0], size):
            yield Tokens(self.ids[i : i + size].to(device), self.real[i : i + size].to(device), self.padded)


def as_tokens(batch: Int[Tensor, "n t"], attention_mask: Int[Tensor, "n t"] | None = None) -> Tokens:
    """Check a batch and its mask.

    Raises:
        InputError: Not a matrix of token ids, a mask of another shape, or a sequence without any target.
    """
    if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.is_floating_point() or batch.numel() == 0:
        raise InputError("tokens: give a non-empty matrix of token ids [sequences, length]")
    real = torch.ones_like(batch, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != batch.shape:
            raise InputError(
                f"attention mask {tuple(attention_mask.shape)} does not fit tokens {tuple(batch.shape)}"
            )
        real = attention_mask.to(batch.device).bool()
    tokens = Tokens(batch, real, not bool(real.all()))
    empty = (~tokens.targets.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"sequence {empty[0]}: no next token to predict: use at least two real tokens")
    return tokens


def model_inputs(model: nn.Module, tokens: Tokens) -> dict[str, Any]:
    """Keyword arguments of a forward pass without a cache, in which padding shifts no position."""
    inputs: dict[str, Any] = {"input_ids": tokens.ids, "use_cache": False}
    if tokens.padded:
        inputs["attention_mask"] = tokens.real.long()
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = (tokens.real.cumsum(1) - 1).clamp_min(0)
    return inputs


def forward_losses(model: nn.Module, tokens: Tokens) -> Float[Tensor, "n t-1"]:
    """Next-token losses (nats) of one sequence batch, with their graph; 0 where a target does not count."""
    check_length(model, tokens.ids.shape[1])
    losses = losses_from_logits(model(**model_inputs(model, tokens)).logits, tokens.ids)
    return torch.where(tokens.targets.to(losses.device), losses, torch.zeros_like(losses))


@contextmanager
def undisturbed(model: nn.Module, trained: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Evaluation mode, and gradients for ``trained`` only; on leaving, everything is as it was.

    Dropout modes are restored module by module, ``requires_grad`` and ``.grad`` parameter by parameter.
    Inside, ``.grad`` of every parameter starts as None, so that it can accumulate over sequence batches.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(p) for p in trained}
    try:
        model.eval()
        for p, _, _ in states:
            p.requires_grad_(id(p) in wanted)
            p.grad = None
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, required, grad in states:
            p.requires_grad_(required)
            p.grad = grad


@contextmanager
def on_blocks(
    blocks: Sequence[nn.Module],
    visit: Callable[[int, Tensor, Tensor], None],
    *,
    leaf: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """Call ``visit(l, x[l], x[l+1])`` as every block returns; x[L] is thus taken before the final norm.

    Args:
        blocks: The blocks, in order.
        visit: Must reduce what it needs: tensors that it keeps stay alive.
        leaf: When given, x[0] is cut off from the embedding and made a leaf that requires a gradient, and
            is handed over here: a backward pass then ends at it, and no gradient of the embedding is formed.

    Raises:
        InputError: (while the model runs) the model changes the hidden state between two blocks.
    """
    handles = []
    flow: dict[str, Tensor] = {}

    def enter(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if index == 0 and leaf is not None:
                x = x.detach().requires_grad_(True)
                leaf(x)
                if args:
                    args = (x, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": x}
            former = flow.get("x") if index else None
            if former is not None and former is not x and not torch.equal(former.to(x.device), x):
                raise InputError(
                    f"block {index}: its input is not the output of block {index - 1}: "
                    "this architecture changes the residual stream between blocks"
                )
            flow["in"] = x
            return args, kwargs

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            y = hidden_of(output)
            visit(index, flow["in"], y)
            flow["x"] = y

        return hook

    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
            handles.append(block.register_forward_hook(leave(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def on_inputs(
    modules: Mapping[Any, nn.Module | None], visit: Callable[[Any, Tensor], None]
) -> Iterator[None]:
    """Call ``visit(key, input)`` as each of the modules is entered; None entries are skipped."""
    handles = []

    def hook_for(key: Any) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            visit(key, args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor)))

        return hook

    try:
        for key, module in modules.items():
            if module is not None:
                handles.append(module.register_forward_pre_hook(hook_for(key), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def wide(tensor: Tensor) -> Tensor:
    """At least float32: half-precision sums of squares overflow on massive activations."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


@dataclass(frozen=True)
class Change:
    """Token by token (``[b, t]``): |x|, |y|, |y - x| and <x, y - x> in float32 or wider."""

    before: Tensor
    after: Tensor
    update: Tensor
    product: Tensor

    @property
    def gap(self) -> Tensor:
        """``1 - cos(x, y)`` as ``(|y-x|^2 - (|y|-|x|)^2) / (2|x||y|)``, exact also where y is near x."""
        product = self.before * self.after
        gap = (self.update**2 - (self.after - self.before) ** 2) / (2 * product)
        return torch.where(product > 0, gap, torch.ones_like(gap)).clamp(0.0, 2.0)

    def squares(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per sequence, summed over the masked tokens: |x|^2, |y|^2, |y-x|^2."""
        before, after, update = (
            torch.where(mask, v**2, 0.0).sum(1) for v in (self.before, self.after, self.update)
        )
        return before, after, update


def change(x: Float[Tensor, "b t d"], y: Float[Tensor, "b t d"], before: Tensor | None = None) -> Change:
    """The lengths of x, y and y - x over the last axis; ``before`` is |x| where it is already known."""
    x, y = wide(x), wide(y)
    update, length = y - x, torch.linalg.vector_norm
    return Change(
        before=length(x, dim=-1) if before is None else before,
        after=length(y, dim=-1),
        update=length(update, dim=-1),
        product=torch.linalg.vecdot(x, update),
    )


def global_gap(xx: Any, yy: Any, ff: Any) -> Any:
    """``1 - cos`` of the flattened batch from the sums |x|^2, |y|^2, |y-x|^2 (works on arrays)."""
    return 1.0 - (xx + yy - ff) / (2.0 * (xx * yy) ** 0.5)


def check_finite(lengths: Tensor, real: Tensor, where: str) -> None:
    """Refuse NaN and infinities at real tokens.

    Raises:
        InputError: Naming the place.
    """
    if not bool(torch.isfinite(lengths[real]).all()):
        raise InputError(f"{where}: values are not finite: check the weights, or use a wider --dtype")
