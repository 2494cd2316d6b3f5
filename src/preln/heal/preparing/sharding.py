"""Blocks spread over the processes, each of which holds a part of every weight (FSDP2 of torch).

Embedding, final norm and head stay whole everywhere: the head is called in chunks, outside any block. A block
gathers its weights when it runs and drops them afterwards, in both passes; its gradient arrives as the sum
over all processes, cut like the weight.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.heal.options.recipe import Recipe
from preln.heal.options.settings import TrainingSettings
from preln.heal.preparing.layout import trainable_parameters
from preln.heal.training.workers import Workers
from preln.models import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from preln.heal.preparing.prepare import Prepared

MODES = ("auto", "on", "off")
_SHARE = 0.8  # of a GPU's memory; what passes need takes the rest


def wants_shards(
    mode: str,
    model: PreTrainedModel,
    recipe: Recipe,
    settings: TrainingSettings,
    workers: Workers,
    device: torch.device,
    *,
    drop: Iterable[int] | None = None,
) -> bool:
    """Whether a run shards the blocks.

    ``auto`` does where it can and where weights, gradients and the optimizer's two moments would take more
    than 0.8 of a GPU's memory; on the CPU it does not.

    Raises:
        InputError: An unknown mode; ``on`` where there is one process, or for what cannot be sharded.
    """
    if mode not in MODES:
        raise InputError(f"shard={mode!r}: choose one of {', '.join(MODES)}")
    if mode == "off":
        return False
    reason = _hindrance(recipe, settings, workers)
    if mode == "on":
        if reason is not None:
            raise InputError(reason)
        return True
    if reason is not None or device.type != "cuda":
        return False
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    wide = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    needed = held + 3 * wide * trainable_parameters(model, recipe, drop=drop)
    return needed > _SHARE * torch.cuda.get_device_properties(device).total_memory


def _hindrance(recipe: Recipe, settings: TrainingSettings, workers: Workers) -> str | None:
    """Why a run cannot be sharded; None if it can."""
    if workers.count == 1:
        return "shard=on: this is one process: start several by accelerate launch or torchrun, or use off"
    if recipe.quantised is not None:
        return f"recipe {recipe.name}: 4-bit weights cannot be sharded: use lora, or shard=off"
    if settings.optimizer != "adamw":
        return f"optimizer={settings.optimizer}: its moments cannot be sharded: use adamw, or shard=off"
    if recipe.objective == "seam":
        return f"recipe {recipe.name}: its passes end at a cut: use distill, or shard=off"
    return None


def shard(prepared: Prepared, workers: Workers, device: torch.device) -> None:
    """Spread the blocks of a prepared model over the processes, in place; move everything to ``device``.

    One block at a time is whole on the device. Afterwards ``prepared.parameters`` holds the parts.

    Raises:
        InputError: Blocks that share a weight, or train weights of several dtypes; a torch without the sum.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise InputError(f"shard=on: FSDP of torch {torch.__version__} only averages gradients: update torch")
    blocks = find_blocks(prepared.plain)[1]
    _check_blocks(prepared, blocks)
    names = {id(parameter): name for name, parameter in prepared.model.named_parameters()}
    stored = {key: names[id(parameter)] for key, parameter in prepared.parameters.items()}
    mesh = init_device_mesh(device.type, (workers.count,))
    for block in blocks:
        scalars = {parameter for parameter in block.parameters() if parameter.ndim == 0}
        for scalar in scalars:  # they cannot be cut, and their gradients are summed like the head's
            scalar.data = scalar.data.to(device)
        # every block is a root of its own, since passes begin and end at any of them; a root would keep its
        # weights between the passes unless it is told not to
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        sum_gradients(block)
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in prepared.model.modules():
        if id(module) not in inside:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensor.data = tensor.data.to(device)
    prepared.parameters = {key: prepared.model.get_parameter(name) for key, name in stored.items()}
    prepared.sharded = True


def sum_gradients(block: Any) -> None:
    """Have a sharded block add the processes' gradients, where FSDP takes their mean.

    A portion's loss is divided by the tokens of the whole batch, so the sum is the batch's gradient.
    """
    block.set_gradient_divide_factor(1.0)
    block.set_force_sum_reduction_for_comms(True)


def _check_blocks(prepared: Prepared, blocks: Sequence[nn.Module]) -> None:
    """Whether every block has weights of its own, and trains in one dtype.

    Raises:
        InputError: A block has not.
    """
    inside = [list(block.parameters()) for block in blocks]
    uses = Counter(id(parameter) for parameters in inside for parameter in parameters)
    names = {id(module): name for name, module in prepared.plain.named_modules()}
    for block, parameters in zip(blocks, inside, strict=True):
        if any(uses[id(parameter)] > 1 for parameter in parameters):
            raise InputError(f"{names[id(block)]}: shares weights with another block: use shard=off")
        if len({parameter.dtype for parameter in parameters if parameter.requires_grad}) > 1:
            raise InputError(f"{names[id(block)]}: trains weights of several dtypes: load the model in one")


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over the processes (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """All of a tensor; where it is spread, every process must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def cut(full: Tensor, like: Any) -> Tensor:
    """The rows of a whole tensor that this process holds of ``like``; all, where that is not spread.

    Of n rows over p processes, process r holds rows ``r ceil(n / p)`` to ``(r + 1) ceil(n / p)``.
    """
    if not is_sharded(like):
        return full
    rows = -(-full.shape[0] // like.device_mesh.size())
    return full[rows * like.device_mesh.get_local_rank() :][:rows]


def join(part: Tensor, like: Any) -> Tensor:
    """A spread tensor from the part that this process holds; ``part`` itself where ``like`` is not spread."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    form: dict[str, Any] = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(part.to(like.device), like.device_mesh, like.placements, **form)


def gathered(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Whole copies on the CPU, made one after the other; a process that does not ``keep`` them takes part."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.to("cpu", copy=True).contiguous()
    return found


def part_groups(optimizer: torch.optim.Optimizer) -> None:
    """Put spread parameters and others into groups of their own, where an optimizer has both in one.

    It may update the tensors of a group in one call, which takes one kind.
    """
    for group in list(optimizer.param_groups):
        other = [parameter for parameter in group["params"] if not is_sharded(parameter)]
        if 0 < len(other) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if is_sharded(parameter)]
            optimizer.add_param_group({**group, "params": other})


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], most: float | None) -> float:
    """Euclidean norm g of the whole gradient; the gradient is then multiplied by ``min(1, most / g)``.

    The squares of spread gradients are summed over the processes; what every process holds counts once.

    Args:
        parameters: What trains.
        most: Largest norm; None leaves the gradient as it is.
    """
    if not any(is_sharded(parameter) for parameter in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if most is None else most))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    device = local(parameters[0]).device
    squares = torch.zeros(2, dtype=torch.float64, device=device)
    for gradient in gradients:
        norm = torch.linalg.vector_norm(local(gradient), dtype=torch.float32)
        squares[int(is_sharded(gradient))] += norm.double().square()
    torch.distributed.all_reduce(squares[1:])
    norm = float(squares.sum().sqrt())
    if most is not None:
        scale = min(1.0, most / (norm + 1e-6))  # the small number as in torch's function
        for gradient in gradients:
            local(gradient).mul_(scale)
    return norm


def held_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that this process holds of some tensors; one that comes twice counts once."""
    parts = {id(tensor): local(tensor) for tensor in tensors if isinstance(tensor, Tensor)}
    return sum(part.numel() * part.element_size() for part in parts.values())


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device: every module and shape, and no numbers."""
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    kept = {id(p): nn.Parameter(empty[id(p)]) for p in model.parameters() if p.is_floating_point()}
    return copy.deepcopy(model, empty | kept).eval()
