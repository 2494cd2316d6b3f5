"""Device, dtype and attention implementation, refused early where they cannot be had."""

from __future__ import annotations

from preln.base.errors import InputError
from preln.base.faults import is_out_of_memory

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")


def check_device(device: str) -> str:
    """``device`` once it is known to exist here.

    Raises:
        InputError: No such device on this machine.
    """
    import torch

    if device == "auto":
        return device
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"--device {device}: not a device: use cpu, cuda, cuda:0 or auto") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device on this machine: use cpu")
    if kind != "cpu":
        try:
            torch.empty(1, device=device).cpu()
        except Exception as error:  # each kind of device says in its own way that it is not there
            if is_out_of_memory(error):
                raise
            raise InputError(f"--device {device}: cannot be used on this machine: use cpu or cuda") from error
    return device


def check_attention(name: str | None) -> str | None:
    """``name`` once transformers knows an attention implementation of that name; None is its own choice.

    Raises:
        InputError: An unknown name.
    """
    if name is None:
        return name
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name not in known:
        raise InputError(f"attention {name!r}: unknown: use eager or sdpa, or one of {', '.join(known)}")
    return name


def check_dtype(dtype: str) -> str:
    """``dtype`` once it is known to be one that models are loaded in.

    Raises:
        InputError: An unknown name.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: unknown: use one of {', '.join(DTYPES)}")
    return dtype
