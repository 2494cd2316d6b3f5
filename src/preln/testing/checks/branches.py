"""Small residual branches in float64, stacks of them, and Jacobians of maps on a whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from preln.testing.cases import gain
from preln.testing.layers import NormLayer, autograd_jacobian, dense_sigma

TOKENS, WIDTH, SEQUENCES = 3, 4, 6
MATRICES = {"linear": 1, "mlp": 3, "attention": 4}
EPS = (1e-6, 1e-2, 0.25, 1.0)
SCALES = (0.02, 0.2, 1.0, 3.0)
GAINS = ("none", "normal", "ties", "zeros")


@dataclass(frozen=True)
class Branch:
    """What a block adds to the residual stream, without its norm.

    Attributes:
        kind: `linear`, y -> W y; `mlp`, the gated W3 (silu(W1 y) * W2 y); `attention`, one causal head.
        weights: `[matrices, d, d]`.
    """

    kind: str
    weights: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        """Apply the branch to `[..., T, d]`."""
        if self.kind == "linear":
            return y @ self.weights[0].mT
        if self.kind == "mlp":
            gate, up, down = self.weights
            return (torch.nn.functional.silu(y @ gate.mT) * (y @ up.mT)) @ down.mT
        query, key, value, out = self.weights
        scores = (y @ query.mT) @ (y @ key.mT).mT / y.shape[-1] ** 0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ (y @ value.mT) @ out.mT


def draw_branch(kind: str, generator: torch.Generator, *, d: int = WIDTH, scale: float = 1.0) -> Branch:
    """Return a random branch whose last matrix is multiplied by `scale`."""
    weights = torch.randn(MATRICES[kind], d, d, dtype=torch.float64, generator=generator) / d**0.5
    weights[-1] *= scale
    return Branch(kind, weights)


def multiple_of_identity(factor: float, d: int = WIDTH) -> Branch:
    """Return the linear branch y -> factor y."""
    return Branch("linear", factor * torch.eye(d, dtype=torch.float64)[None])


class Draw(NamedTuple):
    """An attention and an MLP branch, two norms of one kind, and `[n, T, d]` sequences."""

    attention: Branch
    mlp: Branch
    first: NormLayer
    second: NormLayer
    x: Tensor


def draws(*, seed: int, rounds: int, kinds: Sequence[str] = ("rms_norm", "layer_norm")) -> Iterator[Draw]:
    """Yield random halves of a block with their norms, over branch sizes, eps, gains and kinds of norm.

    Among the sequences are one with a zero token and one with a constant token.
    """
    generator = torch.Generator().manual_seed(seed)
    for turn in range(rounds):
        for at, kind in enumerate(kinds):
            scale = SCALES[turn % len(SCALES)]
            attention, mlp = (draw_branch(name, generator, scale=scale) for name in ("attention", "mlp"))
            norms = []
            for half in range(2):
                eps = EPS[(turn + at + half) % len(EPS)]
                weight = gain(GAINS[(turn // 2 + half) % len(GAINS)], WIDTH, generator)
                norms.append(NormLayer(kind, eps, weight))
            x = torch.randn(SEQUENCES, TOKENS, WIDTH, dtype=torch.float64, generator=generator)
            x[0, 0], x[1, 1] = 0.0, 1.5
            yield Draw(attention, mlp, norms[0], norms[1], x)


class Block(NamedTuple):
    """A Pre-LN block x -> x + branch(norm(x))."""

    norm: NormLayer
    branch: Branch

    def update(self, x: Tensor) -> Tensor:
        """Return what the block adds."""
        return self.branch(self.norm(x))


def draw_stacks(*, seed: int, rounds: int, depth: int = 4) -> Iterator[tuple[list[Block], Tensor]]:
    """Yield Pre-LN stacks, attention and MLP in turn, and `[n, T, d]` sequences."""
    pairs = iter(draws(seed=seed, rounds=rounds * (depth // 2)))
    for first in pairs:
        blocks = [Block(first.first, first.attention), Block(first.second, first.mlp)]
        while len(blocks) < depth:
            more = next(pairs)
            blocks += [Block(more.first, more.attention), Block(more.second, more.mlp)]
        yield blocks, first.x


def hidden_states(blocks: Sequence[Block], x: Tensor) -> list[Tensor]:
    """Return x_0 to x_L."""
    states = [x]
    for block in blocks:
        states.append(states[-1] + block.update(states[-1]))
    return states


def sequence_jacobian(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Jacobian of a map on whole sequences `[n, T, d]` by autograd: `[n, T d, T d]`."""
    shape = x.shape[-2:]
    return autograd_jacobian(lambda flat: layer(flat.unflatten(-1, shape)).flatten(-2), x.flatten(-2))


def over_tokens(blocks: Tensor) -> Tensor:
    """Return `[n, T d, T d]` matrices with the given `[n, T, d, d]` blocks on the diagonal."""
    n, tokens, d = blocks.shape[:3]
    eye = torch.eye(tokens, dtype=blocks.dtype)
    return torch.einsum("ntij,ts->ntisj", blocks, eye).reshape(n, tokens * d, tokens * d)


class Part(NamedTuple):
    """A branch's Jacobian A and its norm's G, `[n, T d, T d]`, with a = sigma(A) and g = sigma(G), `[n]`."""

    branch: Tensor
    norm: Tensor
    a: Tensor
    g: Tensor


def part(branch: Callable[[Tensor], Tensor], at: Tensor, norm: NormLayer, norm_at: Tensor) -> Part:
    """Return A by autograd at `at`, G from the closed forms at `norm_at`; g = max over tokens of sigma."""
    jacobian = sequence_jacobian(branch, at)
    gains = norm.sigma(norm_at).amax(-1)
    return Part(jacobian, over_tokens(norm.jacobian(norm_at)), dense_sigma(jacobian), gains)


def pre_norm_part(block: Block, x: Tensor) -> Part:
    """Return the pieces of a Pre-LN block at x: A at the normed input, G at x."""
    return part(block.branch, block.norm(x), block.norm, x)


def smallest(matrix: Tensor) -> Tensor:
    """Return the smallest singular value."""
    return torch.linalg.svdvals(matrix)[..., -1]
