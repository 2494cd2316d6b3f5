"""The blocks' linear maps in 4 bits, in memory, and back (NF4 of QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError, require
from preln.heal.preparing.parts import is_transposed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quietly(package: str) -> ModuleType:
    """Import peft or bitsandbytes without the remark of the latter on kernels that are not used here.

    Raises:
        MissingExtraError: It is not installed.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return require(package, extra="heal")
    finally:
        logger.setLevel(level)


def refuse_quantised(model: Any) -> None:
    """Whether a model's weights are still plain numbers, as every recipe needs them.

    Raises:
        InputError: The model was loaded in 8 or 4 bits, or in another packed form.
    """
    packed = (
        name for name, p in model.named_parameters() if type(p).__name__ in ("Params4bit", "Int8Params")
    )
    name = next(packed, None)
    if name is not None or getattr(model, "is_quantized", False):
        which = type(model).__name__ if name is None else name
        raise InputError(
            f"{which}: is quantised already: load the model in float32 or bfloat16, and use qlora"
        )


def quantise(model: nn.Module, maps: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace linear maps by NF4 ones with double quantisation, in place.

    A weight is cut into groups of 64, each divided by its largest magnitude and rounded to the nearest of 16
    levels; the magnitudes themselves are kept in 8 bits. bitsandbytes multiplies by the de-quantised weight
    in the weight's former dtype, and passes the gradient back through that same weight.

    On CPUs with AVX512-BF16, its layer switches to a kernel for inference as soon as it is called in
    evaluation mode with an input that needs no gradient, whatever the grad mode and the number of tokens: it
    repacks its weight for good, and from then on rounds to bfloat16 and passes no gradient at all, in
    training too. One validation between two steps is enough. The switch is turned off here.

    Args:
        model: The model that holds the maps.
        maps: The maps by full name; ``nn.Linear`` or GPT-2's ``Conv1D``.

    Returns:
        The former modules without their weights, for :func:`dequantise`.

    Raises:
        InputError: A weight whose dtype has no 4-bit form.
        MissingExtraError: bitsandbytes is not installed.
    """
    layers = quietly("bitsandbytes").nn
    shells: dict[str, nn.Module] = {}
    for name, module in maps.items():
        weight = module.get_parameter("weight").detach()
        if weight.dtype not in _DTYPES:
            narrow = str(weight.dtype).removeprefix("torch.")
            raise InputError(f"{name}: a weight in {narrow} has no 4-bit form: load the model in float32")
        if is_transposed(module):
            weight = weight.t()
        outputs, inputs = weight.shape
        with torch.device("meta"):
            layer = layers.Linear4bit(
                inputs, outputs, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
            )
        packed = layers.Params4bit(
            weight.contiguous(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        )
        layer.weight = packed.to(weight.device)
        layer.bias = module.bias
        layer.support_avx512bf16_for_cpu = False
        layer.train(module.training)
        shells[name] = _shell(module)
        _put(model, name, layer)
    return shells


def _shell(module: nn.Module) -> nn.Module:
    """The module without weight and bias, which it no longer keeps alive."""
    shell = copy.copy(module)
    vars(shell)["_parameters"] = dict.fromkeys(module._parameters)
    return shell


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def dequantised_weight(layer: Any) -> Tensor:
    """The weight ``[outputs, inputs]`` that a 4-bit layer multiplies by, in its former dtype.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    functional = quietly("bitsandbytes").functional
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def dequantise(model: nn.Module, shells: Mapping[str, nn.Module]) -> None:
    """Put plain modules with the de-quantised weights where :func:`quantise` put 4-bit ones, in place.

    The result computes what the 4-bit model computes. The weights as they were before quantisation are gone.
    """
    for name, shell in shells.items():
        layer: Any = model.get_submodule(name)
        weight = dequantised_weight(layer)
        weight = weight.t().contiguous() if is_transposed(shell) else weight
        shell.weight = nn.Parameter(weight, requires_grad=False)
        shell.bias = layer.bias
        shell.train(layer.training)
        _put(model, name, shell)


def check_differentiable(model: nn.Module, shells: Mapping[str, nn.Module]) -> None:
    """Whether no 4-bit layer has fallen back to the kernel for inference (see :func:`quantise`).

    Raises:
        InputError: One has.
    """
    for name in shells:
        layer: Any = model.get_submodule(name)
        layer = getattr(layer, "base_layer", layer)
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise InputError(
                f"{name}: bitsandbytes has packed its 4-bit weight for inference, and passes no gradient: "
                "use lora, or a GPU"
            )
