"""A linear map known only by its products, and Jacobians as such maps."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preln.base.errors import InputError

_NO_DOUBLE_BACKWARD = (
    "jacobian: the function has no double backward: use eager attention, and no fused or compiled kernels"
)


@dataclass(frozen=True)
class LinearOperator:
    """A linear map J, or a batch of independent ones, given by ``v -> J v`` and ``u -> J^T u``.

    Attributes:
        matvec: Takes a tensor of ``in_shape`` to one of ``out_shape``.
        rmatvec: The adjoint: takes ``out_shape`` to ``in_shape``.
        in_shape: Shape of the tensors that J acts on.
        out_shape: Shape of its results.
        dtype: Of both.
        device: Of both.
        batch: Number of leading axes, equal in both shapes, that index independent maps: with
            ``batch=1`` and shapes ``[b, t, d]`` there are b maps on ``[t, d]``, and one product serves all.
        project: Orthogonal projection of ``in_shape`` onto the subspace outside of which J is zero, where
            that is not the whole space: iterations start inside it, or zero would count as a singular value.
    """

    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor]
    in_shape: torch.Size
    out_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    batch: int = 0
    project: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.in_shape[: self.batch] != self.out_shape[: self.batch]:
            raise InputError(
                f"operator: batch axes differ, {tuple(self.in_shape)} against {tuple(self.out_shape)}: "
                f"give both the same first {self.batch} sizes"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``: each map is a matrix with m rows and n columns."""
        return math.prod(self.out_shape[self.batch :]), math.prod(self.in_shape[self.batch :])

    @property
    def batch_size(self) -> int:
        """Number of independent maps."""
        return math.prod(self.in_shape[: self.batch])


def matrix_operator(matrix: Float[Tensor, "*batch m n"]) -> LinearOperator:
    """The operator of an explicit matrix, or of a batch of them.

    >>> op = matrix_operator(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    >>> op.matvec(torch.tensor([1.0, 1.0])).tolist(), op.rmatvec(torch.tensor([1.0, 1.0])).tolist()
    ([3.0, 1.0], [1.0, 3.0])
    """
    *lead, m, n = matrix.shape
    return LinearOperator(
        matvec=lambda v: torch.einsum("...mn,...n->...m", matrix, v),
        rmatvec=lambda u: torch.einsum("...mn,...m->...n", matrix, u),
        in_shape=torch.Size([*lead, n]),
        out_shape=torch.Size([*lead, m]),
        dtype=matrix.dtype,
        device=matrix.device,
        batch=len(lead),
    )


def jacobian_operator(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "*shape"], *, batch: int = 0
) -> LinearOperator:
    """The Jacobian J of ``function`` at ``x``, by products on one retained graph.

    ``J^T u`` is one backward pass. ``J v`` differentiates ``w -> J^T w``, which is linear in w, once more
    (the double-backward trick, J. Townsend 2017): its cost is about one forward pass, since the graph of
    ``J^T w`` is built once and kept. The function is evaluated once, here.

    Args:
        function: Differentiable twice by backward passes. The fused attention kernels are not: use eager
            attention or ``sdpa_kernel(SDPBackend.MATH)`` around this call.
        x: The point, of any shape; not modified.
        batch: Number of leading axes along which ``function`` acts independently.

    Raises:
        InputError: The value of ``function`` does not depend on ``x`` through autograd, or the first
            derivative cannot be differentiated again (here or in the first product).
    """
    point = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        value = function(point)
        if not value.requires_grad:
            raise InputError("jacobian: the function's value does not depend on its input by autograd")
        cotangent = torch.zeros_like(value, requires_grad=True)
        with _differentiable():
            (pulled,) = torch.autograd.grad(value, point, cotangent, create_graph=True)
    if not pulled.requires_grad:
        raise InputError(_NO_DOUBLE_BACKWARD)

    def matvec(v: Tensor) -> Tensor:
        with _differentiable():
            (result,) = torch.autograd.grad(pulled, cotangent, v, retain_graph=True)
        return result

    def rmatvec(u: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(value, point, u, retain_graph=True)
        return result

    return LinearOperator(matvec, rmatvec, point.shape, value.shape, value.dtype, value.device, batch)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Turn torch's refusals to differentiate into one line with the mend; other errors pass."""
    try:
        yield
    except RuntimeError as error:  # also where a derivative is not written
        refusals = (
            "not implemented",
            "double backward",
            "once_differentiable",
            "does not require grad",
            "not have been used in the graph",
        )
        if any(words in str(error) for words in refusals):
            raise InputError(_NO_DOUBLE_BACKWARD) from error
        raise


def forward_mode_jacobian(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "*shape"], *, batch: int = 0
) -> LinearOperator:
    """The same Jacobian with ``J v`` by forward-mode ``torch.func.jvp``: nothing is kept between products.

    Slower by product than `jacobian_operator`, but it holds no second-order graph, and it is an
    independent route to the same numbers.
    """
    point = x.detach()
    both: Any = torch.func.vjp(function, point)  # typed as if has_aux might add a third item
    value, pullback = both

    def matvec(v: Tensor) -> Tensor:
        return torch.func.jvp(function, (point,), (v,))[1].detach()

    def rmatvec(u: Tensor) -> Tensor:
        return pullback(u)[0].detach()

    return LinearOperator(matvec, rmatvec, point.shape, value.shape, value.dtype, value.device, batch)


def minus_identity(operator: LinearOperator) -> LinearOperator:
    """``J - I``: the update of a residual block, whose Jacobian J is (``J - P`` on a subspace).

    Raises:
        InputError: The map's two shapes differ.
    """
    if operator.in_shape != operator.out_shape:
        raise InputError(f"J - I needs equal shapes, not {tuple(operator.in_shape)} and "
                         f"{tuple(operator.out_shape)}: subtract from a block's Jacobian only")  # fmt: skip
    identity = operator.project or (lambda v: v)
    return replace(
        operator,
        matvec=lambda v: operator.matvec(v) - identity(v),
        rmatvec=lambda u: operator.rmatvec(u) - identity(u),
    )


def compose(*operators: LinearOperator) -> LinearOperator:
    """The product ``A B ... C`` of operators, the last of which acts first.

    Raises:
        InputError: Neighbours do not fit.
    """
    for left, right in itertools.pairwise(operators):
        if left.in_shape != right.out_shape or left.batch != right.batch:
            raise InputError(f"product of operators: {tuple(left.in_shape)} does not take "
                             f"{tuple(right.out_shape)}: give maps that fit each other")  # fmt: skip

    def matvec(v: Tensor) -> Tensor:
        return functools.reduce(lambda w, operator: operator.matvec(w), reversed(operators), v)

    def rmatvec(u: Tensor) -> Tensor:
        return functools.reduce(lambda w, operator: operator.rmatvec(w), operators, u)

    return replace(operators[-1], matvec=matvec, rmatvec=rmatvec, out_shape=operators[0].out_shape)


def restricted(operator: LinearOperator, keep: Tensor) -> LinearOperator:
    """``P J P`` with P the projection that multiplies by ``keep``, zeros and ones that fit both shapes.

    For a batch of padded sequences, ``keep`` is the mask ``[b, t, 1]`` of the real tokens.
    """
    keep = keep.to(operator.device, operator.dtype)
    return replace(
        operator,
        matvec=lambda v: operator.matvec(v * keep) * keep,
        rmatvec=lambda u: operator.rmatvec(u * keep) * keep,
        project=lambda v: v * keep,
    )
