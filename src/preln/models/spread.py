"""Models that accelerate has spread over several devices, made fit for being cut and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from preln.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def settle(model: PreTrainedModel, name: str = "the model") -> PreTrainedModel:
    """Let torch's own hooks bring every part's input to its device; returns ``model``.

    accelerate replaces the ``forward`` of the model object by one that is bound to it: a copy that shares its
    weights (:func:`preln.models.view`) would run all blocks of the original. Hooks are copied with a module.

    Args:
        model: As ``from_pretrained(device_map=…)`` or ``accelerate.dispatch_model`` returns it.
        name: What errors call it.

    Raises:
        InputError: A part is kept outside the devices, where its weights cannot be measured.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise InputError(
                f"{name}: the devices have no room for {key!r}: "
                "use more or larger ones, or a narrower --dtype"
            )
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return model
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for module in model.modules():  # each keeps a forward that is bound to the original, not to a copy
        own: Any = vars(module).get("forward")
        if getattr(own, "__func__", None) is type(module).forward:
            del module.forward
    skipped = getattr(model, "_skip_keys_device_placement", None)
    for path, device in places.items():
        model.get_submodule(path).register_forward_pre_hook(_Bring(device, skipped), with_kwargs=True)
    home: Any = model.get_input_embeddings().weight
    model.register_forward_hook(_Return(home.device))
    return model


class _Bring:
    """Moves what a module is called with to its device."""

    def __init__(self, device: Any, skipped: Any) -> None:
        self.device, self.skipped = torch.device(device), skipped

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Positional and keyword arguments, moved; a cache sees to its own place."""
        from accelerate.utils import send_to_device

        moved = send_to_device(kwargs, self.device, skip_keys=self.skipped)
        return send_to_device(args, self.device), moved


class _Return:
    """Moves what the whole model returns to where its input was."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """The output, moved."""
        from accelerate.utils import send_to_device

        return send_to_device(output, self.device)
