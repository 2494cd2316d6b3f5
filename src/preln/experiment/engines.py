"""Where the steps of a study run: here, one after another, or side by side on a Ray cluster."""

from __future__ import annotations

import os
import re
import socket
import sys
from dataclasses import dataclass, fields

from preln.base.errors import InputError, require
from preln.experiment.lab import Lab
from preln.experiment.store import RunStore, Step
from preln.experiment.study import Study

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Engine:
    """An engine and, for Ray, what it may use.

    Attributes:
        name: ``local`` or ``ray``.
        address: Of a Ray cluster; None starts one on this machine for the length of the run.
        retries: How often a step is given to another worker after its worker was lost.
        cpus: CPU cores that a step takes; None takes as many as this process has torch threads.
        gpus: GPUs that a step takes, or a part of one; None takes 1 where the study's device is a GPU.

    Raises:
        InputError: An unknown engine, a number below 0, or Ray's settings for another engine.
    """

    name: str = "local"
    address: str | None = None
    retries: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise InputError(f"--engine {self.name}: unknown: use one of {', '.join(ENGINES)}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None and self.name != "ray":
                raise InputError(f"--{field.name}: only for --engine ray: leave it out")
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise InputError(f"--{field.name} {value}: must be a number of at least 0")


LOCAL = Engine()
_HOST = re.compile(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)")
_ANSWER_S = 10.0  # for a cluster to answer; Ray itself tries for minutes


def check_engine(engine: Engine, out: str | os.PathLike[str]) -> None:
    """Refuse an engine that cannot start, before anything is written.

    Raises:
        InputError: Ray is missing, nothing answers at its address, or the workers cannot see ``out``.
    """
    if engine.name == "local":
        return
    require("ray", extra="ray")
    if os.fspath(out).startswith("memory://"):
        raise InputError(f"--out {out}: lives in one process: name a folder or an address for --engine ray")
    place = _HOST.fullmatch(engine.address or "")
    try:
        if place is not None:
            socket.create_connection((place[1], int(place[2])), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--address {engine.address}: nothing answers ({error}): start a cluster there with "
            "`ray start --head`, or leave --address out"
        ) from error


def describing_lab(study: Study, store: RunStore, engine: Engine) -> Lab:
    """The study's model and data as this process needs them; an unknown model is refused here.

    The driver of a cluster needs hashes alone: it makes them on the CPU and keeps no model.
    """
    if engine.name == "local":
        lab = Lab(study, store)
        lab.model  # noqa: B018  loaded now
        return lab
    lab = Lab(study.model_copy(update={"device": "cpu", "device_map": "none"}), store)
    known = {"identity": lab.identity, "num_blocks": lab.num_blocks}
    lab = Lab(study, store)
    vars(lab).update(known)
    return lab


def run_steps(steps: list[Step], lab: Lab, out: str | os.PathLike[str], engine: Engine) -> list[str]:
    """Carry out the steps that are not finished; returns their ids, in the order of ``steps``.

    Args:
        steps: Every step of the study, dependencies first.
        lab: The study, its store, and the hashes of model and data.
        out: The run folder or address, as a worker finds it.
        engine: Where they run.

    Raises:
        InputError: Whatever a step says; what was finished before is kept.
    """
    if engine.name == "ray":
        from preln.experiment.ray_engine import run_on_ray

        return run_on_ray(steps, lab, out, engine)
    ran: list[str] = []
    for number, step in enumerate(steps, 1):
        place = f"[{number}/{len(steps)}] {step.id}"
        if lab.store.is_finished(step):
            say(f"{place}: kept")
            continue
        say(f"{place}: …")
        seconds = lab.store.execute(step)
        ran.append(step.id)
        say(f"{place}: {seconds:.1f} s")
    return ran


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)
