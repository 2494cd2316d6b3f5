"""What a study will take before it runs: operations, memory, disk and seconds of every step on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from preln.base.errors import InputError
from preln.experiment.estimate.demands import Desk
from preln.experiment.estimate.hardware import HERE, Hardware, find_hardware
from preln.experiment.estimate.workload import Demand, Load
from preln.experiment.outline import outline
from preln.experiment.placement import PlacementStudy
from preln.experiment.study import Study
from preln.heal import get_recipe
from preln.models.configs import meta_model, read_config

# Share of the machine's matrix-product rate that the products of a pass reach. On the CPU fitted, together
# with MOVED (workload.py) and the fixed seconds (demands.py), to the committed quickstart run on cpu-2. On a
# GPU not fitted: large bfloat16 products reach 0.6 to 0.8 of the data sheet, and a pass has small ones too.
EFFICIENCY = {"cpu": 0.7, "gpu": 0.5}
# Share of the data sheet's bandwidth; on cpu-2 the bandwidth itself was measured
BANDWIDTH = {"cpu": 1.0, "gpu": 0.7}
CALL = 5e-4  # seconds in Python to call a block once; a device that is faster waits (derived)
HASHED = 1e9  # bytes a second of SHA-256 (derived)
SHARDED = 0.8  # what is left of the rate where devices exchange parameters (derived)
ROOM = 0.92  # share of a device's memory that a step may fill


@dataclass(frozen=True)
class Row:
    """The estimate of one step.

    Attributes:
        id: The step.
        kind: Its kind.
        operations: Of its matrix products.
        memory: Bytes at once.
        disk: Bytes that stay.
        scratch: Bytes on disk while it runs.
        stored: Bytes on disk from there until the run's workspace is removed.
        seconds: Its time.
        devices: Devices that its memory is spread over.
        fits: Whether the machine has so many.
        notes: Where it does not fit one device: the mend; what was assumed.
    """

    id: str
    kind: str
    operations: float
    memory: float
    disk: float
    scratch: float
    stored: float
    seconds: float
    devices: int
    fits: bool
    notes: tuple[str, ...]


def seconds(load: Load, machine: Hardware, dtype: str, *, shared: int = 1) -> float:
    """Time of a load: products or the reading of their weights, whichever takes longer, and the rest.

    ``max(operations / (rate e), read / bandwidth) + moved / bandwidth``, never below the time that Python
    takes to call the blocks; then disk, hashes and fixed seconds.

    Args:
        load: The work.
        machine: Where.
        dtype: Of the products.
        shared: Devices that divide it among them.

    >>> from preln.experiment.estimate.hardware import HARDWARE
    >>> round(seconds(Load(operations=1.33e11), HARDWARE["cpu-2"], "float32"), 3)
    1.0
    """
    spread = 1.0 if shared == 1 else shared * SHARDED
    rate = machine.rate(dtype) * EFFICIENCY[machine.kind] * spread
    bandwidth = machine.bandwidth * BANDWIDTH[machine.kind] * spread
    device = max(load.operations / rate, load.read / bandwidth) + load.moved / bandwidth
    return max(device, load.calls * CALL) + load.disk / machine.disk + load.hashed / HASHED + load.fixed


def estimate(study: Study | PlacementStudy, hardware: str | Hardware = HERE) -> dict[str, Any]:
    """Operations, memory, disk and time of every step, and in total; no weights are loaded.

    Blocks that a criterion will choose are not known: a pruned model is taken to lack the last ones, which
    matters only where blocks are unlike each other. The study's own device plays no part: it is taken to run
    on the machine's.

    Args:
        study: The study.
        hardware: A name of :data:`preln.experiment.estimate.hardware.HARDWARE`, ``here``, or a machine.

    Returns:
        ``{"study", "model", "config_from", "parameters", "hardware", "dtype", "steps": [...], "totals"}``,
        JSON-ready; bytes and seconds throughout.

    Raises:
        InputError: An unknown model or machine, more blocks to go than there are, or a model whose products
            shapes do not tell.
    """
    if not isinstance(study, Study):
        raise InputError(
            f"{study.name}: models trained from scratch are not sized up: use `preln run --dry-run`"
        )
    dtype = "bfloat16" if study.dtype == "auto" else study.dtype
    known = read_config(study.model)
    machine = hardware if isinstance(hardware, Hardware) else find_hardware(hardware, dtype)
    machine.rate(dtype)  # refused before anything is counted
    desk = Desk(study, meta_model(known.config, dtype), machine.kind, machine.memory * ROOM)
    if (most := max(cut.count(desk.shape.blocks) for cut in study.prune.cuts)) >= desk.shape.blocks:
        raise InputError(f"prune.drop: {most} of {desk.shape.blocks} blocks: remove fewer than all")
    plan = outline(study)
    rows = [_row(desk.demand(step), machine, dtype) for step in plan]
    before = seconds(desk.loading(), machine, dtype)
    needs = {step.id: step.needs for step in plan}
    totals = {
        "operations": sum(row.operations for row in rows),
        "memory": max(row.memory for row in rows),
        "disk": sum(row.disk for row in rows),
        "scratch": max(row.scratch for row in rows) + sum(row.stored for row in rows),
        "loading_seconds": before,
        "seconds": before + sum(row.seconds for row in rows),
        "seconds_side_by_side": before + side_by_side(rows, needs, machine.devices),
        "fits": all(row.fits for row in rows),
    }
    return {
        "study": study.name,
        "model": study.model,
        "config_from": known.source,
        "parameters": desk.shape.parameters,
        "hardware": {
            "name": machine.name,
            "devices": machine.devices,
            "rate": machine.rate(dtype),
            "bandwidth": machine.bandwidth,
            "memory": machine.memory,
            "source": machine.source,
        },
        "dtype": dtype,
        "steps": [{**vars(row), "notes": list(row.notes)} for row in rows],
        "totals": totals,
    }


def _row(demand: Demand, machine: Hardware, dtype: str) -> Row:
    """One step on a machine: how many devices hold it, how long it takes, and what to say."""
    room = machine.memory * ROOM
    devices = max(1, math.ceil(demand.memory / room))
    fits = devices <= machine.devices
    notes = list(demand.notes)
    if devices > 1:
        notes.insert(0, _mend(demand, machine))
    # a measuring step spread over devices runs its blocks one device after another
    shared = devices if demand.sharded and fits else 1
    spent = seconds(demand.load, machine, dtype, shared=shared)
    step = demand.step
    taken = (
        step.id,
        step.kind,
        demand.load.operations,
        demand.memory,
        demand.disk,
        demand.scratch,
        demand.stored,
    )
    return Row(*taken, seconds=spent, devices=devices, fits=fits, notes=tuple(notes))


def _mend(demand: Demand, machine: Hardware) -> str:
    """What to do about a step that does not fit one device."""
    what = f"does not fit one device of {machine.memory / 1e9:.0f} GB"
    if machine.kind == "cpu":
        return f"{what}: use a narrower dtype, a smaller batch or a larger machine"
    if not demand.sharded:
        return f"{what}: spread the model over more devices (--device auto), or use a narrower dtype"
    four_bits = demand.step.run is not None and get_recipe(demand.step.run.recipe).quantised is not None
    smaller = "a smaller batch" if four_bits else "a 4-bit recipe (qlora), a smaller batch"
    return f"{what}: use {smaller}, or more devices (preln heal --shard on)"


def side_by_side(rows: list[Row], needs: dict[str, tuple[str, ...]], devices: int) -> float:
    """Seconds until the last step ends if steps run at the same time, in order, wherever devices are free.

    >>> rows = [Row(name, "probe", 0, 0, 0, 0, 0, 3.0, 1, True, ()) for name in "ab"]
    >>> side_by_side(rows, {"a": (), "b": ()}, 2)
    3.0
    """
    free = [0.0] * devices
    ended: dict[str, float] = {}
    for row in rows:
        free.sort()
        count = min(row.devices, devices)
        start = max([free[count - 1], *(ended.get(need, 0.0) for need in needs[row.id])])
        ended[row.id] = start + row.seconds
        free[:count] = [ended[row.id]] * count
    return max(ended.values(), default=0.0)


def table(found: dict[str, Any]) -> str:
    """The estimate for people."""
    machine, totals = found["hardware"], found["totals"]
    head = (
        f"{found['study']}: {found['model']} ({found['parameters'] / 1e9:.3g} B parameters), {found['dtype']}"
    )
    lines = [f"{head}, on {machine['name']} ({machine['devices']} x {machine['memory'] / 1e9:.0f} GB)"]
    width = max(len(row["id"]) for row in found["steps"])
    columns = f"{'step':<{width}}  {'operations':>10}  {'memory':>8}  {'disk':>8}  {'time':>8}  devices"
    lines += ["", columns]
    for row in found["steps"]:
        lines.append(
            f"{row['id']:<{width}}  {row['operations']:>10.2e}  {_bytes(row['memory']):>8}  "
            f"{_bytes(row['disk']):>8}  {_time(row['seconds']):>8}  {row['devices']:>7}"
        )
    lines.append(
        f"{'total':<{width}}  {totals['operations']:>10.2e}  {_bytes(totals['memory']):>8}  "
        f"{_bytes(totals['disk']):>8}  {_time(totals['seconds']):>8}"
    )
    lines.append("")
    if machine["devices"] > 1:
        lines.append(f"steps side by side on all devices: {_time(totals['seconds_side_by_side'])}")
    if totals["scratch"]:
        lines.append(f"in the run's workspace: {_bytes(totals['scratch'])} of disk beside the above")
    told: dict[str, list[str]] = {}
    for row in found["steps"]:
        for note in row["notes"]:
            told.setdefault(note, []).append(row["id"])
    lines += [f"{_few(ids)}: {note}" for note, ids in told.items()]
    return "\n".join(lines).rstrip()


def _few(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"


def _bytes(size: float) -> str:
    """A number of bytes for people.

    >>> _bytes(37_700_000)
    '37.7 MB'
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def _time(spent: float) -> str:
    """A duration for people.

    >>> _time(95), _time(5400)
    ('1.6 min', '1.5 h')
    """
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if spent >= unit:
            return f"{spent / unit:.1f} {name}"
    return f"{spent:.1f} s"
