"""Machines, as far as the time of a study depends on them: published numbers, or this one's, measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preln.base.errors import InputError

HERE = "here"
_SIDE, _COPIED, _PATIENCE_S = 1024, 2**26, 0.8


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: Its name on the command line.
        kind: ``cpu`` or ``gpu``.
        rates: Operations a second of dense matrix products on one device, by dtype; two a multiply-add.
        bandwidth: Bytes a second between one device and its own memory.
        memory: Bytes of memory a device.
        devices: How many of them.
        disk: Bytes a second read from or written to disk.
        source: Where the numbers come from, for people.
    """

    name: str
    kind: str
    rates: dict[str, float]
    bandwidth: float
    memory: float
    devices: int = 1
    disk: float = 1e9
    source: str = ""

    def rate(self, dtype: str) -> float:
        """Matrix-product rate of one device in a dtype.

        Raises:
            InputError: No rate is known; the line lists the dtypes that have one.
        """
        if dtype not in self.rates:
            known = ", ".join(sorted(self.rates))
            raise InputError(f"hardware {self.name}: no matrix-product rate for {dtype}: use one of {known}")
        return self.rates[dtype]


def _gpu(
    name: str, half: float, single: float, double: float, bandwidth: float, memory: float, source: str,
    devices: int = 1,
) -> Hardware:  # fmt: skip
    """A GPU; torch multiplies float32 matrices without TF32 unless told otherwise: the plain rate counts."""
    rates = {"bfloat16": half, "float16": half, "float32": single, "float64": double}
    return Hardware(name, "gpu", rates, bandwidth, memory, devices, 2e9, source)


_H100 = (989e12, 67e12, 67e12, 3.35e12, 80e9)
_DENSE = "data sheet, dense rates without sparsity"
_TABLE = (
    # best of 1024 x 1024 products a core, and of copies of 256 MB, while the other core was busy; other
    # processors of two cores differ: `here` measures
    Hardware(
        "cpu-2",
        "cpu",
        {"float32": 190e9, "float64": 95e9, "bfloat16": 700e9},
        bandwidth=10e9,
        memory=24e9,
        disk=0.5e9,
        source="measured on two cores of an Intel Xeon of the Sapphire Rapids family",
    ),
    # NVIDIA Ada GPU architecture white paper, appendix A: tensor products that add up in float32
    _gpu("rtx-4090", 165.2e12, 82.6e12, 1.29e12, 1.008e12, 24e9, f"NVIDIA {_DENSE}"),
    # NVIDIA A100 data sheet: 40 GB with HBM2, 80 GB with HBM2e, SXM
    _gpu("a100-40gb", 312e12, 19.5e12, 19.5e12, 1.555e12, 40e9, f"NVIDIA {_DENSE}"),
    _gpu("a100-80gb", 312e12, 19.5e12, 19.5e12, 2.039e12, 80e9, f"NVIDIA {_DENSE}"),
    # NVIDIA H100 data sheet, SXM; the printed tensor rates are with sparsity, twice these
    _gpu("h100-80gb", *_H100, f"NVIDIA {_DENSE}"),
    # NVIDIA H200 data sheet, SXM
    _gpu("h200", 989e12, 67e12, 67e12, 4.8e12, 141e9, f"NVIDIA {_DENSE}"),
    _gpu("8xh100-80gb", *_H100, f"NVIDIA {_DENSE}", devices=8),
)
HARDWARE = {each.name: each for each in _TABLE}


def find_hardware(name: str, dtype: str = "float32") -> Hardware:
    """The machine of a name; ``here`` is this one, measured in about two seconds.

    Args:
        name: One of :data:`HARDWARE`, or ``here``.
        dtype: Of the products to measure.

    Raises:
        InputError: No such machine; the line lists those there are.

    >>> find_hardware("8xh100-80gb").devices
    8
    """
    if name == HERE:
        return measure_here(dtype)
    if name not in HARDWARE:
        raise InputError(f"hardware {name!r}: unknown: choose here or one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def measure_here(dtype: str = "float32") -> Hardware:
    """This machine: its first CUDA device where there is one, else its processor.

    The rate is that of the fastest product of two 1024 x 1024 matrices (8192 x 8192 on a GPU), the bandwidth
    that of the fastest copy, which reads and writes.
    """
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    side = 8 * _SIDE if cuda else _SIDE
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    x = torch.empty(_COPIED, dtype=torch.float32, device=device)
    y = torch.zeros_like(x)
    wait = torch.cuda.synchronize if cuda else lambda: None
    rate = 2 * side**3 / _least(lambda: a @ a, wait)
    bandwidth = 2 * x.numel() * x.itemsize / _least(lambda: x.copy_(y), wait)
    if cuda:
        found: Any = torch.cuda.get_device_properties(0)
        memory, count, kind = float(found.total_memory), torch.cuda.device_count(), "gpu"
    else:
        memory, count, kind = _installed(), 1, "cpu"
    disk = 2e9 if cuda else 0.5e9
    return Hardware(HERE, kind, {dtype: rate}, bandwidth, memory, count, disk, "measured just now")


def _least(call: Callable[[], object], wait: Callable[[], object]) -> float:
    """Least seconds of a call, repeated for a while."""
    least, end = float("inf"), time.perf_counter() + _PATIENCE_S
    while True:
        began = time.perf_counter()
        call()
        wait()
        now = time.perf_counter()
        least = min(least, now - began)
        if now > end:
            return least


def _installed() -> float:
    """Bytes of this machine's memory, or 16 GB where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 16e9
