"""MKA: neighbours that lie alike on the manifold of their activations are averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from preln.base.errors import InputError
from preln.models import find_blocks
from preln.models.residual import as_tokens, forward_losses, on_blocks, undisturbed, wide
from preln.prune.plan import Plan
from preln.prune.replace.merging import Group, gone, may_merge, merge, single_blocks, spared_blocks, written
from preln.prune.replace.registry import method_plan, replacement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = npt.NDArray[np.float64]


@replacement("mka")
def mka(
    model: PreTrainedModel,
    tokens: Tensor,
    drop: int,
    *,
    seed: int = 0,
    protect: str = "none",
    dimensions: int = 2,
    samples: int = 512,
) -> tuple[PreTrainedModel, Plan]:
    """Merge the most similar neighbours, ``a theta_i + (1 - a) theta_j`` (Liu et al. 2024, MKA).

    The outputs of every block at ``samples`` tokens are embedded by a diffusion map (Coifman, Lafon 2006);
    S is the mutual information of two embeddings, normalised to [0, 1]; the pair of neighbours with the
    largest S is merged with the weight ``a = S``, and again, until ``drop`` blocks are gone. A merged block
    stands for its last member in later comparisons, since its output takes that member's place.

    The paper normalises by entropies from nearest neighbours, which may be negative and whose quotient then
    has no meaning; here the mutual information is that of the Gaussian copula and its normal form Linfoot's
    (1957) ``sqrt(1 - exp(-2 I / dimensions))``, see :func:`similarity_matrix`. Published code assigns into
    ``state_dict()``, which changes nothing: it removes the upper block of every pair.

    Args:
        model: A causal model.
        tokens: Calibration tokens ``[n, T]``.
        drop: How many blocks go.
        seed: Draws the tokens that are embedded.
        protect: Preset of blocks that neither go nor change.
        dimensions: Of the embedding.
        samples: Tokens embedded, at most.

    Raises:
        InputError: Too few tokens, settings out of range, or protection that leaves no neighbours to merge.
    """
    if dimensions < 1 or samples < 4 * dimensions + 4:
        raise InputError("mka: dimensions is at least 1, and samples at least 4 a dimension and 4 more")
    count = len(find_blocks(model)[1])
    spared = spared_blocks(protect, count)
    similar = similarity_matrix(block_outputs(model, tokens, samples, seed), dimensions)
    groups = single_blocks(count)
    for _ in range(drop):
        pairs = [
            (similar[max(groups[k]), max(groups[k + 1])], k)
            for k in range(len(groups) - 1)
            if may_merge(groups[k : k + 2], spared)
        ]
        if not pairs:
            raise InputError(f"mka: protection {protect!r} leaves too few neighbours to merge {drop}")
        weight, place = max(pairs)
        groups = [*groups[:place], _average(groups[place], groups[place + 1], weight), *groups[place + 2 :]]
    plan = method_plan(
        "mka",
        count,
        drop,
        seed,
        protect,
        drop=gone(groups, count),
        dimensions=dimensions,
        samples=samples,
        merged=written(groups),
    )
    return merge(model, groups), plan


def _average(one: Group, other: Group, weight: float) -> Group:
    """``a one + (1 - a) other``."""
    return {i: float(weight * w) for i, w in one.items()} | {
        i: float((1 - weight) * w) for i, w in other.items()
    }


@torch.no_grad()
def block_outputs(model: PreTrainedModel, batch: Tensor, samples: int, seed: int) -> list[Array]:
    """The output of every block, ``[samples, d]`` each, at tokens drawn once for all blocks."""
    tokens, blocks = as_tokens(batch), find_blocks(model)[1]
    total = int(tokens.real.sum())
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:samples])
    found: list[list[Tensor]] = [[] for _ in blocks]
    device = next(model.get_input_embeddings().parameters()).device
    with undisturbed(model):
        for part in tokens.batches(4, device):
            real = part.real
            with on_blocks(blocks, lambda k, _, y: found[k].append(wide(y)[real.to(y.device)].cpu())):  # noqa: B023
                forward_losses(model, part)
    return [torch.cat(parts).double().numpy()[chosen] for parts in found]


def diffusion_map(points: Array, dimensions: int) -> Array:
    """Diffusion coordinates ``[n, dimensions]`` of points ``[n, d]`` (Coifman, Lafon 2006, alpha = 1/2).

    ``K_ij = exp(-|x_i - x_j|^2 / s^2)`` with s the median distance; ``K / (q_i q_j)^(1/2)`` with q its row
    sums; of the Markov matrix that dividing by the row sums again gives, the right eigenvectors after the
    constant one, times their eigenvalues.
    """
    square = np.square(points).sum(1)
    distance = np.maximum(square[:, None] + square[None, :] - 2 * points @ points.T, 0.0)
    np.fill_diagonal(distance, 0.0)
    scale = float(np.median(distance[~np.eye(len(points), dtype=bool)]))
    kernel = np.exp(-distance / (scale or 1.0))
    density = kernel.sum(1)
    kernel = kernel / np.sqrt(np.outer(density, density))
    rows = np.sqrt(kernel.sum(1))
    values, vectors = np.linalg.eigh(kernel / np.outer(rows, rows))
    order = np.argsort(values)[::-1][1 : dimensions + 1]
    return values[order] * vectors[:, order] / rows[:, None]


def mutual_information(one: Array, other: Array) -> float:
    """Mutual information (nats) of two embeddings ``[n, k]`` under a Gaussian copula.

    Every column is replaced by the normal scores of its ranks; with R the correlations of all columns,
    ``I = -1/2 log(det R / (det R_one det R_other))``. 0 for independent, infinite for dependent columns.
    """
    both = np.concatenate([one, other], axis=1)
    ranks = both.argsort(0, kind="stable").argsort(0, kind="stable")
    matrix = np.atleast_2d(np.corrcoef(_normal_scores(ranks), rowvar=False))
    k = one.shape[1]
    dets = (np.linalg.det(part) for part in (matrix, matrix[:k, :k], matrix[k:, k:]))
    joint, first, second = (max(float(d), 0.0) for d in dets)
    ratio = joint / (first * second) if first * second > 0 else 0.0
    return float("inf") if ratio <= 0 else max(-0.5 * float(np.log(ratio)), 0.0)


def _normal_scores(ranks: npt.NDArray[np.int64]) -> Array:
    """``Phi^-1((rank + 1/2) / n)``."""
    return torch.special.ndtri(torch.from_numpy((ranks + 0.5) / len(ranks))).numpy()


def similarity_matrix(outputs: list[Array], dimensions: int) -> Array:
    """``S_ij = sqrt(1 - exp(-2 I_ij / k))`` of the diffusion maps of the blocks' outputs, in [0, 1].

    For k = 1 and jointly normal coordinates it is the absolute correlation (Linfoot 1957).

    Raises:
        InputError: Fewer tokens than the estimate needs.
    """
    if len(outputs[0]) < 4 * dimensions + 4:
        raise InputError(f"mka: {len(outputs[0])} tokens are too few: give at least {4 * dimensions + 4}")
    embedded = [diffusion_map(points, dimensions) for points in outputs]
    result = np.ones((len(embedded), len(embedded)))
    for i, one in enumerate(embedded):
        for j in range(i):
            information = mutual_information(one, embedded[j])
            result[i, j] = result[j, i] = np.sqrt(-np.expm1(-2.0 * information / dimensions))
    return result
