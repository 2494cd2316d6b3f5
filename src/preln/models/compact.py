"""Models without some branches: modules that stand where a branch was, and checkpoints that say so.

Plain transformers would build the missing branches with random weights, so a compact checkpoint is closed to
it twice: its ``model_type`` is one that transformers does not know, and its weights carry a variant in their
file name, without which no weights are found. :func:`preln.load_model` reads it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.base.files import read_json, write_json
from preln.models.halves import Half
from preln.models.roles import same
from preln.models.structure import find_blocks, hidden_of
from preln.models.trial import Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = MODEL_TYPE = "preln_halves"
VARIANT = "preln"


class StandIn(nn.Module):
    """Stands where a module was, without weights.

    Attributes:
        gives: ``zeros``, or the place (``0``, ``1``) or name of the argument that it hands on.
        returns: How many values the module returned: 0 for a bare tensor, else the length of its tuple.
        layer_idx: Where the module kept its keys and values, if it did.
    """

    def __init__(self, gives: str, returns: int = 0, layer_idx: int | None = None) -> None:
        super().__init__()
        self.gives, self.returns, self.layer_idx = gives, returns, layer_idx

    def extra_repr(self) -> str:
        """What stands here."""
        return f"gives={self.gives}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the silenced module returned."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.layer_idx is not None:
            _count_tokens(hidden, self.layer_idx, (*args, *kwargs.values()))
        if self.gives == "zeros":
            given = torch.zeros_like(hidden)
        else:
            given = args[int(self.gives)] if self.gives.isdigit() else kwargs[self.gives]
        return given if self.returns == 0 else (given, *[None] * (self.returns - 1))


def _count_tokens(hidden: Tensor, layer: int, values: Sequence[Any]) -> None:
    """Tell the key-value cache how many tokens came by: masks and positions are counted on its layers.

    A layer's length is that of its keys, so one number a token is kept in place of heads and channels.
    """
    from transformers.cache_utils import Cache

    for value in values:
        if isinstance(value, Cache):
            empty = hidden.new_zeros(*hidden.shape[:2], 1).unsqueeze(1)
            value.update(empty, empty, layer)


class _Compact:
    """Mixed into a model class: builds its stand-ins from the configuration and saves itself as compact."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        parent.__init__(config, *args, **kwargs)
        place(self, getattr(config, KEY))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As every model, but closed to loaders that would fill the gaps with random weights."""
        model: Any = self
        setattr(model.config, KEY, describe_stand_ins(model))
        parent: Any = super()
        parent.save_pretrained(save_directory, **{**kwargs, "variant": VARIANT})
        file = Path(save_directory) / "config.json"
        values = read_json(file)
        values[KEY]["model_type"] = values["model_type"]
        write_json(file, {**values, "model_type": MODEL_TYPE})


@functools.cache
def _compact_class(base: type) -> type:
    """``base`` with stand-ins; by the same name, since that is what its checkpoints list."""
    return type(base.__name__, (_Compact, base), {"__module__": base.__module__})


def is_compact(model: nn.Module) -> bool:
    """Whether some branches of the model are stand-ins."""
    return isinstance(model, _Compact)


def place(model: Any, described: dict[str, Any]) -> None:
    """Put stand-ins into the blocks as described; the modules that were there are let go."""
    blocks = find_blocks(model)[1]
    for index, modules in described["blocks"].items():
        for path, words in modules.items():
            parent, _, name = path.rpartition(".")
            blocks[int(index)].get_submodule(parent)._modules[name] = StandIn(**words)


def describe_stand_ins(model: PreTrainedModel) -> dict[str, Any]:
    """The stand-ins of every block, by path inside the block, as plain values."""
    blocks: dict[str, Any] = {}
    for index, block in enumerate(find_blocks(model)[1]):
        found = {
            path: {"gives": m.gives, "returns": m.returns, "layer_idx": m.layer_idx}
            for path, m in block.named_modules()
            if isinstance(m, StandIn)
        }
        if found:
            blocks[str(index)] = found
    return {"blocks": blocks}


def _stand_in_for(module: nn.Module, trial: Trial) -> StandIn:
    """A stand-in for a silenced module, by what it returned on the trial's stream.

    Raises:
        InputError: It returned neither zeros nor one of its arguments.
    """
    seen: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # a copy, since some blocks add to what a branch returns in place
        seen.append((args, kwargs, output, hidden_of(output).clone()))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        trial.run()
    finally:
        handle.remove()
    args, kwargs, output, first = seen[0]
    returns = 0 if isinstance(output, Tensor) else len(output)
    gives = None if first.any() else "zeros"
    for name, value in [*((str(i), v) for i, v in enumerate(args)), *kwargs.items()]:
        fits = isinstance(value, Tensor) and value.shape == first.shape
        if gives is None and fits and same(value, first):
            gives = name
    if gives is None:
        raise InputError(f"{type(module).__name__}: its output is not known without it: use --format plain")
    index = next((i for m in module.modules() if isinstance(i := m.__dict__.get("layer_idx"), int)), None)
    return StandIn(gives, returns, index)


def _idle(half: Half, others: Sequence[Half]) -> list[nn.Module]:
    """What else has nothing to do once a half is gone: its own norms, the rest of an MLP without a module."""
    block, parts = half.trial.block, half.parts
    used = {parts.attention_norm_after, parts.mlp_norm_after} if half.placement == "post-ln" else set()
    if not any(o.index == half.index and o.kind != half.kind for o in others):
        used.add(parts.mlp_norm if half.kind == "attention" else parts.attention_norm)
    idle = [m for m in (half.before, half.after) if m is not None and m not in used]
    if half.kind == "mlp" and isinstance(half.modules[0], nn.Linear):
        order = half.trial.trace.order
        start = order.index(parts.attention) + 1 if parts.attention in order else 0
        rest = order[start : order.index(half.modules[0])]
        idle += [m for m in rest if isinstance(m, nn.Linear) and any(m is c for c in block.children())]
    within = {m for module in half.modules for m in module.modules()}
    return [m for m in dict.fromkeys(idle) if m not in within]


@torch.no_grad()
def compact_halves(model: PreTrainedModel, halves: Sequence[Half]) -> PreTrainedModel:
    """Take silenced branches out of ``model``, in place: no weights, no operations; returns ``model``.

    Raises:
        InputError: A norm that stays lies inside the branch, or the block differs without the branch.
    """
    for half in halves:
        block, trial = half.trial.block, half.trial
        where = f"block {half.index}: its {half.kind} branch"
        if half.placement == "post-ln" and any(half.after is m for n in half.modules for m in n.modules()):
            raise InputError(f"{where} holds a norm that stays: use --format plain")
        expected = trial.run()[0]
        paths = {m: path for path, m in block.named_modules()}
        stands = {paths[m]: _stand_in_for(m, trial) for m in half.modules}
        # a norm that both branches read went with the first of them
        stands |= {paths[m]: StandIn("0") for m in _idle(half, halves) if m in paths}
        for path, stand in stands.items():
            parent, _, name = path.rpartition(".")
            block.get_submodule(parent)._modules[name] = stand
        try:
            found = trial.run()[0]
        except Exception as error:  # a block may reach into the module that is gone
            raise InputError(f"{where} is used beside its call ({error}): use --format plain") from error
        if not same(found, expected):
            raise InputError(f"{where} cannot be taken out without a change: use --format plain")
    if not is_compact(model):
        model.__class__ = _compact_class(type(model))
    setattr(model.config, KEY, describe_stand_ins(model))
    return model


def is_compact_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a compact checkpoint."""
    file = Path(folder) / "config.json"
    values = read_json(file) if file.is_file() else None
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def load_compact(folder: str | os.PathLike[str], **settings: Any) -> Any:
    """``from_pretrained`` for a compact checkpoint; ``settings`` go to it.

    Raises:
        InputError: The checkpoint does not say which model it is.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    # read by transformers, which writes infinities in a way of its own
    values: dict[str, Any] = PreTrainedConfig.get_config_dict(folder)[0]
    kind = values.get(KEY, {}).get("model_type")
    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"{folder}: its configuration names no model that is known here: get the files again"
        )
    config = CONFIG_MAPPING[kind].from_dict({**values, "model_type": kind})
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class: Any = _compact_class(base[0] if isinstance(base, tuple) else base)
    return model_class.from_pretrained(folder, config=config, variant=VARIANT, **settings)
