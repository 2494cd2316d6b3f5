"""What the residual stream looks like: sizes, moments, massive activations, effective rank, updates."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from preln.models.residual import Change, check_finite, wide
from preln.probe.masked import TokenSums
from preln.probe.norms import NormLaw

SHAPE = ("massive_token_share", "massive_channel_share", "effective_rank")
MOMENTS = ("norm_input_rms", "norm_input_mean", "norm_input_variance", "variance_le_one")


def largest_shares(
    x: Float[Tensor, "b t d"], squares: Float[Tensor, "b t"], masks: Bool[Tensor, "s b t"]
) -> tuple[Float[Tensor, "s b"], Float[Tensor, "s b"]]:
    """Share of the squared norm that lies in the largest token and in the largest channel, by sequence.

    ``max_t sum_c x_tc^2 / sum x^2`` and ``max_c sum_t x_tc^2 / sum x^2`` over the tokens of each mask:
    1/T and 1/d where the norm is spread evenly, 1 where one token or one channel holds all of it
    (Sun et al. 2024, "Massive activations in large language models").

    >>> x = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    >>> token, channel = largest_shares(x, x.square().sum(-1), torch.ones(1, 1, 2, dtype=torch.bool))
    >>> round(token.item(), 3), round(channel.item(), 3)
    (0.9, 0.9)
    """
    kept = torch.where(masks, squares.double(), 0.0)
    total = kept.sum(-1)
    # double before the sum over tokens: float32 sums lose what is 1e-7 of a massive channel
    channels = torch.einsum("sbt,btc->sbc", masks.to(x.dtype), x.square()).double()
    return kept.amax(-1) / total, channels.amax(-1) / total


def effective_rank(x: Float[Tensor, "b t d"], masks: Bool[Tensor, "s b t"]) -> Float[Tensor, "s b"]:
    """Effective rank of each sequence's states (Roy and Vetterli 2007).

    ``exp(-sum_i p_i log p_i)`` with ``p_i = s_i / sum_j s_j`` and s_i the singular values of the matrix
    ``[t, d]`` of the tokens of the mask: between 1 and min(t, d). The singular values are square roots of
    eigenvalues of the smaller Gram matrix in float64, so values under 1e-8 of the largest are noise.

    >>> two = effective_rank(torch.eye(4)[None, :2], torch.ones(1, 1, 2, dtype=torch.bool))
    >>> round(two.item(), 6)
    2.0
    """
    wide_x = x.double()
    if x.shape[1] <= x.shape[2]:
        # tokens that a mask leaves out are rows and columns of zeros
        weights = masks.to(wide_x.dtype)
        gram = (wide_x @ wide_x.mT) * weights[..., :, None] * weights[..., None, :]
    else:
        kept = wide_x * masks.to(wide_x.dtype)[..., None]
        gram = kept.mT @ kept
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


class Stream:
    """Measures of states and updates for one sequence batch after the other."""

    def __init__(self, sums: TokenSums) -> None:
        self.sums, self.wanted = sums, sums.wanted

    def state(self, layer: int, x: Tensor, lengths: Tensor) -> None:
        """x[layer], ``[b, t, d]`` in float32 or wider, and its lengths."""
        self.sums.mean("residual_rms", layer, "block", lengths / x.shape[-1] ** 0.5)
        masks = self.sums.masks.to(x.device)
        if self.wanted & set(SHAPE[:2]):
            token, channel = largest_shares(x, lengths.double().square(), masks)
            self.sums.each("massive_token_share", layer, "block", token)
            self.sums.each("massive_channel_share", layer, "block", channel)
        if "effective_rank" in self.wanted:
            self.sums.each("effective_rank", layer, "block", effective_rank(x, masks))

    def update(self, layer: int, site: str, moved: Change) -> None:
        """What the block, or one half of it, does to the stream."""
        # a zero vector (the embedding of a padding token used as a separator) has no ratio
        some = moved.before > 0
        self.sums.mean("update_ratio", layer, site, moved.update / moved.before, where=some)
        self.sums.mean("cosine", layer, site, 1.0 - moved.gap)
        if "update_cosine" in self.wanted:
            both = some & (moved.update > 0)
            cosine = (moved.product / (moved.before * moved.update)).clamp(-1.0, 1.0)
            self.sums.mean("update_cosine", layer, site, cosine, where=both)
        if site != "block":
            return
        self.sums.mean("block_influence", layer, site, moved.gap)
        self.sums.mean("residual_growth", layer, site, moved.after / moved.before, where=some)
        if "block_influence_global" in self.wanted:
            per_mask = [moved.squares(mask) for mask in self.sums.masks.to(moved.before.device)]
            sides = [torch.stack(side) for side in zip(*per_mask, strict=True)]
            self.sums.put("block_influence_global", layer, site, "global_gap", *sides)

    def norm(self, layer: int, site: str, h: Tensor, law: NormLaw | None, where: str) -> None:
        """The input of a norm: its moments, and the spectral norm of the norm's Jacobian there."""
        h = wide(h.detach()).view(*self.sums.tokens.ids.shape, -1)
        lengths = torch.linalg.vector_norm(h, dim=-1)
        # a block that attention broke is found here, before the formula meets the values
        check_finite(lengths, self.sums.tokens.real.to(h.device), where)
        if self.wanted & set(MOMENTS):
            mean = h.mean(dim=-1)
            variance = torch.linalg.vector_norm(h - mean[..., None], dim=-1).square() / h.shape[-1]
            self.sums.mean("norm_input_rms", layer, site, lengths / h.shape[-1] ** 0.5)
            self.sums.mean("norm_input_mean", layer, site, mean)
            self.sums.mean("norm_input_variance", layer, site, variance)
            self.sums.mean("variance_le_one", layer, site, (variance <= 1.0).to(h.dtype))
        if law is None:
            return
        if self.wanted & {"norm_sigma", "norm_sigma_bound", "norm_sigma_tightness"}:
            sigma, bound = law.sigma(h), law.bound(h)
            self.sums.mean("norm_sigma", layer, site, sigma)
            self.sums.mean("norm_sigma_bound", layer, site, bound)
            self.sums.mean("norm_sigma_tightness", layer, site, sigma / bound)
        if "norm_sigma_no_gain" in self.wanted:
            self.sums.mean("norm_sigma_no_gain", layer, site, law.sigma(h, gain=False))
