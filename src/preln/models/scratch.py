"""A small decoder whose blocks differ in nothing but where their norms sit, for models trained from scratch.

With F the attention, G the MLP, N a LayerNorm with a gain of its own and no bias, and l = 1 … L the block
counted from one (the only place here where blocks are not counted from 0):

* ``pre``, ``m = x + F(N(x))``, ``y = m + G(N'(m))`` (Xiong et al. 2020);
* ``scaled``, the same, with every norm's output times ``1/sqrt(l)`` (Sun et al. 2025, LayerNorm Scaling);
* ``post``, ``m = N(x + F(x))``, ``y = N'(m + G(m))`` (Vaswani et al. 2017);
* ``sandwich``, ``m = x + N2(F(N(x)))``, ``y = m + N2'(G(N'(m)))``: two more norms a block.

All have rotary positions, a final norm in front of the head (behind ``post`` it changes nothing at the start,
where its input is a norm's output already), no biases, no dropout, and a head of its own. There is no
key-value cache: these models are measured, they do not generate.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from preln.base.errors import InputError

PLACEMENTS = ("pre", "post", "sandwich", "scaled")


class ScratchConfig(PretrainedConfig):
    """Sizes and placement; ``norm_factors`` holds one number a block, so that it is cut with the blocks."""

    model_type = "preln_scratch"

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 64,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 4,
        intermediate_size: int = 256,
        placement: str = "pre",
        layer_norm_eps: float = 1e-5,
        norm_factors: list[float] | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size, self.layer_norm_eps = intermediate_size, layer_norm_eps
        self.placement = placement
        depths = range(1, num_hidden_layers + 1)
        self.norm_factors = norm_factors or [l**-0.5 if placement == "scaled" else 1.0 for l in depths]  # noqa: E741
        others.setdefault("tie_word_embeddings", False)
        super().__init__(**others)


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021): channels 2j and 2j + 1 are turned."""

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Float[Tensor, "b t d"], rotary: Complex[Tensor, "t 1 e"], mask: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        """Mix the tokens; ``mask`` is None, or true ``[b, 1, t, t]`` where a token may look."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (s.transpose(1, 2) for s in (turn(q, rotary), turn(k, rotary), v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


def rotary_table(length: int, width: int, like: Tensor) -> Complex[Tensor, "t 1 e"]:
    """``exp(i p 10000^(-2j/width))``, p the position, j = 0 … width/2 - 1, as precise as ``like``."""
    speeds = 10000.0 ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float64) / width)
    angles = torch.arange(length, device=like.device, dtype=torch.float64)[:, None, None] * speeds
    return torch.polar(torch.ones_like(angles), angles).to(like.dtype.to_complex())


def turn(x: Float[Tensor, "b t h f"], rotary: Complex[Tensor, "t 1 e"]) -> Float[Tensor, "b t h f"]:
    """Turn each pair of channels, as one complex number, by its position's angle."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotary).flatten(-2)


def _norm(config: ScratchConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)


class Mlp(nn.Module):
    """``W_down gelu(W_up x)``."""

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Act on every token alone."""
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    """One decoder layer under one placement."""

    def __init__(self, config: ScratchConfig, index: int) -> None:
        super().__init__()
        self.placement = config.placement
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.factor = config.norm_factors[index]
        self.attention_norm, self.mlp_norm = _norm(config), _norm(config)
        if self.placement == "sandwich":
            self.attention_norm_after, self.mlp_norm_after = _norm(config), _norm(config)

    def forward(
        self,
        hidden_states: Float[Tensor, "b t d"],
        rotary: Complex[Tensor, "t 1 e"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The stream behind the block."""
        x = hidden_states
        if self.placement == "post":
            m = self.attention_norm(x + self.self_attn(x, rotary, mask))
            return self.mlp_norm(m + self.mlp(m))
        branch = self.self_attn(self._scaled(self.attention_norm(x)), rotary, mask)
        m = x + (self.attention_norm_after(branch) if self.placement == "sandwich" else branch)
        branch = self.mlp(self._scaled(self.mlp_norm(m)))
        return m + (self.mlp_norm_after(branch) if self.placement == "sandwich" else branch)

    # the factor stands behind the norm, not inside: the norm stays one whose Jacobian has a closed form
    def _scaled(self, normed: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return normed if self.factor == 1.0 else self.factor * normed


class ScratchDecoder(PreTrainedModel):
    """Embedding, blocks and final norm."""

    config_class = ScratchConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave values alone: :func:`initialise` sets them all."""

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """The stream behind the final norm; rotary angles are relative: padding in front shifts nothing."""
        x = self.embed_tokens(input_ids)
        length, width = input_ids.shape[1], self.config.hidden_size // self.config.num_attention_heads
        rotary, mask = rotary_table(length, width, x), None
        if attention_mask is not None:
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            real = attention_mask.bool()[:, None, None, :] | torch.eye(
                length, dtype=torch.bool, device=x.device
            )
            mask = causal & real  # a padded token sees itself: a row without any key is NaN
        for block in self.layers:
            x = block(x, rotary, mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class ScratchForCausalLM(PreTrainedModel):
    """The decoder with its head."""

    config_class = ScratchConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__(config)
        self.model = ScratchDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave values alone: :func:`initialise` sets them all."""

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits ``[b, t, v]``."""
        hidden = self.model(input_ids, attention_mask)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))


@torch.no_grad()
def initialise(model: ScratchForCausalLM, seed: int, branch_gain: float = 1.0) -> ScratchForCausalLM:
    """Draw every weight from its own generator, in place; returns ``model``.

    A matrix takes N(0, 1/fan_in), the embedding N(0, 1), a gain 1; the matrices that end a branch are then
    multiplied by ``branch_gain``. With 1 a branch is about as large as the stream, and Post-LN, whose norms
    shrink the stream by what every branch adds, passes little of it on: at 12 blocks it hardly trains.
    The generator of a parameter is made from ``seed`` and its name alone, so models of all placements agree
    in every parameter that they share.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key))
        scale = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
        scale *= branch_gain if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        parameter.copy_(scale * drawn)
    return model


def scratch_model(
    placement: str, *, seed: int = 0, branch_gain: float = 1.0, **sizes: Any
) -> ScratchForCausalLM:
    """An untrained decoder of the given placement, in evaluation mode, float32.

    Args:
        placement: One of :data:`PLACEMENTS`.
        seed: Fixes the initial values.
        branch_gain: See :func:`initialise`.
        **sizes: ``vocab_size``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``,
            ``intermediate_size``.

    Raises:
        InputError: An unknown placement, or a width that the heads do not divide into even parts.

    >>> scratch_model("pre", num_hidden_layers=2).config.norm_factors
    [1.0, 1.0]
    >>> round(scratch_model("scaled", num_hidden_layers=4).model.layers[3].factor, 3)
    0.5
    """
    if placement not in PLACEMENTS:
        raise InputError(f"placement {placement!r}: unknown: use one of {', '.join(PLACEMENTS)}")
    config = ScratchConfig(placement=placement, **sizes)
    if config.hidden_size % (2 * config.num_attention_heads):
        raise InputError(
            f"hidden_size {config.hidden_size}: not a multiple of twice {config.num_attention_heads} heads: "
            "rotary positions turn pairs of a head's channels"
        )
    return initialise(ScratchForCausalLM(config), seed, branch_gain).eval()
