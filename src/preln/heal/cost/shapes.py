"""The matrix products of a block, told from its modules' names and shapes; nothing is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import nn

from preln.base.errors import InputError
from preln.heal.options.recipe import Adapter
from preln.heal.preparing.parts import is_linear, is_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = {
    "q": ("q_proj", "query", "q", "wq"),
    "k": ("k_proj", "key", "k", "wk"),
    "v": ("v_proj", "value", "v", "wv"),
    "out": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
    "qkv": ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "qkv", "in_proj"),
}
_FORMS = ({"q", "k", "v", "out"}, {"qkv", "out"})
_NORM = re.compile(r"norm|ln_|layernorm", re.IGNORECASE)
_LATER = ("post", "final")  # of norms that do not read the block's input
_PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
_EXPERT = re.compile(r"experts\.(\d+)\.")
_MEND = "its products are not counted: count this model by running it"


@dataclass(frozen=True)
class Map:
    """A linear map of a block.

    Attributes:
        name: Full name of the module, or of the weight where that is no module of its own.
        role: What it reads: ``q``, ``k``, ``v``, ``qkv`` (attention's input), ``out`` (attention's weighted
            values), ``in`` (the MLP's input), ``down`` (the MLP's inner state).
        inputs: Numbers it takes.
        outputs: Numbers it gives.
        uses: How often a token goes through it: below or above 1 for experts.
    """

    name: str
    role: str
    inputs: int
    outputs: int
    uses: Fraction = Fraction(1)

    @property
    def operations(self) -> Fraction:
        """Of the forward pass, a token: ``2 i o`` a use."""
        return 2 * self.inputs * self.outputs * self.uses


@dataclass(frozen=True)
class Block:
    """The products of a block.

    Attributes:
        name: Its full name.
        maps: Its linear maps.
        width: Numbers over all heads in a query: heads times their size.
        gain: Whether a norm with parameters stands between the block's input and its first maps.
        parallel: Whether the MLP reads the block's input, not the stream behind attention.
    """

    name: str
    maps: tuple[Map, ...]
    width: int
    gain: bool
    parallel: bool


@dataclass(frozen=True)
class Product:
    """A matrix product of the student's step with its gradients, in operations a token.

    Attributes:
        name: The module, or the block whose attention it is.
        kind: ``map`` (of a block), ``adapter``, ``attention`` or ``head`` (all that follows the blocks).
        inputs: Numbers a token that it takes.
        outputs: Numbers a token that it gives.
        forward: Operations of the forward pass.
        to_input: Operations of the gradients of its inputs (both operands, in attention).
        to_weight: Operations of the gradient of its weight.
        again: Operations of a second forward pass, under gradient checkpointing.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    forward: Fraction
    to_input: Fraction
    to_weight: Fraction
    again: Fraction = Fraction(0)

    @property
    def backward(self) -> Fraction:
        """All that the backward pass takes."""
        return self.to_input + self.to_weight + self.again


def map_shape(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    first, second = module.weight.shape
    return (first, second) if is_transposed(module) else (second, first)


def block_shape(model: PreTrainedModel, name: str) -> Block:
    """What a block multiplies, by names that decoders use; on the meta device too.

    Args:
        model: The model.
        name: Full name of the block.

    Raises:
        InputError: A weight that is no linear map, a number of experts that the configuration does not tell,
            or a block whose attention is of another form; the line names it.
    """
    config: Any = model.config.get_text_config()
    block = model.get_submodule(name)
    maps: list[Map] = []
    for path, module in block.named_modules():
        full = f"{name}.{path}" if path else name
        if is_linear(module):
            inputs, outputs = map_shape(module)
            role = _role(path, inputs, outputs, config.hidden_size)
            maps.append(Map(full, role, inputs, outputs, _linear_uses(block, path, config, full)))
        else:
            maps += _loose(module, path, full, config)
    norms = [module for child, module in block.named_children() if _NORM.search(child)]
    early = [m for child, m in block.named_children() if _NORM.search(child) and not child.startswith(_LATER)]
    before = getattr(config, "do_layer_norm_before", True)
    return Block(
        name,
        tuple(maps),
        _width(name, maps, config.hidden_size),
        gain=bool(before) and any(True for module in early for _ in module.parameters()),
        parallel=len(norms) == 1 or any(getattr(config, flag, False) for flag in _PARALLEL),
    )


def _role(path: str, inputs: int, outputs: int, hidden: int) -> str:
    last = path.rpartition(".")[2]
    if "attn" in path.lower() or "attention" in path.lower():
        return next((role for role, names in _ATTENTION.items() if last in names), "other")
    square = inputs == outputs == hidden  # an inner width of the hidden size: by name
    closing = last.startswith(("down", "fc2", "fc_out", "c_proj", "w2")) if square else outputs == hidden
    return "down" if closing else "in"


def _width(name: str, maps: list[Map], hidden: int) -> int:
    """Numbers over all heads: what attention's output map takes.

    Raises:
        InputError: The attention has other maps than queries, keys, values and output, or other widths.
    """
    own = {m.role: m for m in maps if m.role not in ("in", "down")}
    if not own:
        return 0  # a block whose attention was taken out
    single = len(own) == sum(m.role not in ("in", "down") for m in maps)
    if single and set(own) in _FORMS:
        width = own["out"].inputs
        first = own.get("q") or own["qkv"]
        fits = first.outputs == width if first.role == "q" else width < first.outputs <= 3 * width
        if fits and all(m.inputs == hidden for m in own.values() if m.role != "out"):
            return width
    raise InputError(f"{name}: attention that is not made of queries, keys, values and output: {_MEND}")


def _linear_uses(block: nn.Module, path: str, config: Any, full: str) -> Fraction:
    """1, or the share of tokens that one of several experts sees."""
    match = _EXPERT.search(path)
    if match is None:
        return Fraction(1)
    start = path[: match.start(1)]
    count = len({p[len(start) :].partition(".")[0] for p, _ in block.named_modules() if p.startswith(start)})
    return Fraction(_active(config, full), count)


def _loose(module: nn.Module, path: str, full: str, config: Any) -> list[Map]:
    """Maps whose weights are parameters of a larger module: experts in one tensor, and their router."""
    found = []
    for last, parameter in module.named_parameters(recurse=False):
        if parameter.ndim < 2 or last.endswith("bias"):
            continue
        name, shape = f"{full}.{last}", tuple(parameter.shape)
        if "expert" in path and parameter.ndim == 3:
            role = "down" if last.startswith(("down", "w2")) else "in"
            found.append(Map(name, role, shape[2], shape[1], Fraction(_active(config, name))))
        elif parameter.ndim == 2 and shape[1] == config.hidden_size and ("gate" in path or "router" in path):
            found.append(Map(name, "in", shape[1], shape[0]))
        else:
            raise InputError(f"{name}: a weight of shape {shape} that is no linear map: {_MEND}")
    return found


def _active(config: Any, name: str) -> int:
    """Experts that a token visits.

    Raises:
        InputError: The configuration does not say.
    """
    count = getattr(config, "num_experts_per_tok", None)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{name}: experts, and the configuration has no num_experts_per_tok: {_MEND}")
    return count


def block_products(
    block: Block,
    *,
    reached: bool,
    whole: bool,
    adapted: set[str],
    adapter: Adapter | None,
    attention: Fraction,
    pass_tokens: int | None,
) -> Iterator[Product]:
    """The products of one block, and which of their gradients a step needs.

    Args:
        block: Its shape.
        reached: Whether its input needs a gradient.
        whole: Whether all its parameters train.
        adapted: Names of the maps with an adapter.
        adapter: Their form.
        attention: Operations a token of one product of attention, over its width.
        pass_tokens: Tokens in one pass, over which what DoRA does once is spread; None leaves it out.
    """
    trained = {m.role for m in block.maps if whole or m.name in adapted}
    entry = reached or (whole and block.gain)
    query, key, value = (entry or bool({role, "qkv"} & trained) for role in ("q", "k", "v"))
    mixed = query or key or value
    middle = entry if block.parallel else reached or whole or mixed or "out" in trained
    needed = {"out": mixed, "in": middle, "down": middle or "in" in trained}
    for m in block.maps:
        size, back = m.operations, needed.get(m.role, entry)
        yield Product(m.name, "map", m.inputs, m.outputs, size, size * back, size * whole)
        if adapter is not None and m.name in adapted:
            yield from _factors(m, adapter, back, pass_tokens)
    one, width = attention * block.width, block.width
    back = (query + key) + ((query or key) + value)  # of scores q k^T, and of weighted values p v
    yield Product(block.name, "attention", width, width, 2 * one, back * one, Fraction(0))


def _factors(m: Map, adapter: Adapter, back: bool, pass_tokens: int | None) -> Iterator[Product]:
    """The two factors; under DoRA also their product, on which the length of each row depends."""
    rank = adapter.rank
    first, second = Fraction(2 * rank * m.inputs), Fraction(2 * rank * m.outputs)
    yield Product(f"{m.name} A", "adapter", m.inputs, rank, first, first * back, first)
    yield Product(f"{m.name} B", "adapter", rank, m.outputs, second, second, second)
    if adapter.dora and pass_tokens is not None:
        once = Fraction(2 * rank * m.inputs * m.outputs, pass_tokens)
        yield Product(f"{m.name} B A", "adapter", m.inputs, m.outputs, once, Fraction(0), Fraction(0))
