"""The norm layers people run, each beside its closed form.

`NORM_MODULES[name](weight, eps)` builds one with a gain close to `weight`: a module that stores 1 + w gets
w = weight - 1, one without gain ignores it. `NormModule.layer` has the gain and eps that the module then
really uses. Biases are set and not zero: they must not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from preln.base.errors import require
from preln.testing.layers import NormLayer
from preln.testing.properties import BRIDGING, EXACT

Factory = Callable[[Tensor, float], "NormModule"]
"""(gain `[d]` in float64, eps) -> the module"""


@dataclass(frozen=True)
class NormModule:
    """A norm module in use and what the theorems take it for.

    Attributes:
        name: its class, or where it sits.
        module: maps `[..., *heads, d]` to the same shape.
        layer: the closed form, with the gain in float64 as the module uses it.
        dtype: what the module is given.
        exact: whether it computes in float64 when it is given float64; else it computes in float32.
        heads: extra dimensions before the last one, for a gain that differs from head to head.
    """

    name: str
    module: Callable[[Tensor], Tensor]
    layer: NormLayer
    dtype: torch.dtype
    exact: bool
    heads: tuple[int, ...] = ()

    @property
    def tolerance(self) -> float:
        """The largest relative error to expect of its backpropagated Jacobian."""
        return EXACT if self.exact else BRIDGING


def _wrap(name: str, kind: str, module: Any, eps: float, *, exact: bool, offset: float = 0.0) -> NormModule:
    """Set a module's bias, freeze it and read off the gain it uses: `offset` plus the weight it stores."""
    dtype = torch.float64 if exact else torch.float32
    module = module.to(dtype).requires_grad_(False).eval()
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(torch.linspace(-3.0, 5.0, module.bias.shape[-1]))
    stored = getattr(module, "weight", None)
    # The sum is rounded as the module rounds it.
    gain = None if stored is None else (stored + offset if offset else stored).to(torch.float64)
    heads = () if gain is None else tuple(gain.shape[:-1])
    return NormModule(name, module, NormLayer(kind, eps, gain), dtype, exact, heads)


def _torch(weight: Tensor, eps: float, *, name: str, kind: str) -> NormModule:
    module = getattr(torch.nn, name)(len(weight), eps=eps, dtype=torch.float64)
    module.weight.data.copy_(weight)
    return _wrap(f"torch.nn.{name}", kind, module, eps, exact=True)


def _of(family: str, name: str) -> Any:
    return getattr(require(f"transformers.models.{family}.modeling_{family}", extra="all"), name)


def _rms(weight: Tensor, eps: float, *, family: str, name: str, offset: float = 0.0) -> NormModule:
    module = _of(family, name)(len(weight), eps=eps)
    module.weight.data.copy_(weight - offset)
    return _wrap(name, "rms_norm", module, eps, exact=False, offset=offset)


def _gpt2(weight: Tensor, eps: float) -> NormModule:
    config = require("transformers.models.gpt2.configuration_gpt2", extra="all").GPT2Config(
        n_embd=len(weight), n_head=1, n_inner=1, layer_norm_epsilon=eps
    )
    module = _of("gpt2", "GPT2Block")(config, layer_idx=0).ln_1
    module.weight.data.copy_(weight)
    return _wrap("GPT2Block.ln_1", "layer_norm", module, eps, exact=True)


def _gpt_neox(weight: Tensor, eps: float) -> NormModule:
    config = require("transformers.models.gpt_neox.configuration_gpt_neox", extra="all").GPTNeoXConfig(
        hidden_size=len(weight), num_attention_heads=1, intermediate_size=1, layer_norm_eps=eps
    )
    module = _of("gpt_neox", "GPTNeoXLayer")(config, layer_idx=0).input_layernorm
    module.weight.data.copy_(weight)
    return _wrap("GPTNeoXLayer.input_layernorm", "layer_norm", module, eps, exact=True)


def _cohere(weight: Tensor, eps: float, *, per_head: bool) -> NormModule:
    """CohereLayerNorm; with `per_head`, as on queries and keys: here two heads, the second gain reversed."""
    gain = torch.stack([weight, weight.flip(0)]) if per_head else weight
    module = _of("cohere", "CohereLayerNorm")(hidden_size=tuple(gain.shape), eps=eps)
    module.weight.data.copy_(gain)
    name = "CohereLayerNorm per head" if per_head else "CohereLayerNorm"
    return _wrap(name, "layer_norm", module, eps, exact=False)


def _nemotron(weight: Tensor, eps: float) -> NormModule:
    module = _of("nemotron", "NemotronLayerNorm1P")(len(weight), eps=eps, dtype=torch.float64)
    module.weight.data.copy_(weight - 1.0)
    return _wrap("NemotronLayerNorm1P", "layer_norm", module, eps, exact=True, offset=1.0)


def _olmo(weight: Tensor, eps: float) -> NormModule:
    """OlmoLayerNorm: neither gain nor a choice of eps."""
    return _wrap("OlmoLayerNorm", "layer_norm", _of("olmo", "OlmoLayerNorm")(len(weight)), 1e-5, exact=False)


_LLAMA_LIKE = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3", "phi3": "Phi3", "olmo2": "Olmo2"}
_GEMMA_LIKE = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3"}

_RMS: dict[str, Factory] = {
    "torch.nn.RMSNorm": partial(_torch, name="RMSNorm", kind="rms_norm"),
    **{f"{n}RMSNorm": partial(_rms, family=f, name=f"{n}RMSNorm") for f, n in _LLAMA_LIKE.items()},
    **{
        f"{n}RMSNorm": partial(_rms, family=f, name=f"{n}RMSNorm", offset=1.0) for f, n in _GEMMA_LIKE.items()
    },
}
_LN: dict[str, Factory] = {
    "torch.nn.LayerNorm": partial(_torch, name="LayerNorm", kind="layer_norm"),
    "GPT2Block.ln_1": _gpt2,
    "GPTNeoXLayer.input_layernorm": _gpt_neox,
    "CohereLayerNorm": partial(_cohere, per_head=False),
    "CohereLayerNorm per head": partial(_cohere, per_head=True),
    "NemotronLayerNorm1P": _nemotron,
    "OlmoLayerNorm": _olmo,
}

NORM_MODULES: dict[str, Factory] = {**_RMS, **_LN}
RMS_MODULES = tuple(_RMS)
LN_MODULES = tuple(_LN)
