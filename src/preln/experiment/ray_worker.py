"""What a worker of a cluster does: make the study anew, see that it is the same, and carry out one step."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

from preln.base.errors import InputError
from preln.base.provenance import package_versions
from preln.experiment.lab import Lab
from preln.experiment.mirror import open_store
from preln.experiment.pipeline import build_steps, code_hash
from preln.experiment.store import RunStore, Step
from preln.experiment.study import Study

SEEN_S = 60.0  # for a shared folder to show what another machine wrote


@dataclass(frozen=True)
class Order:
    """What a worker is told about a step.

    Attributes:
        study: The study, as JSON.
        out: The run folder or address.
        step: Id of the step.
        kind: Its kind.
        key: Hash of its inputs and of those of all that it needs, as the driver sees them.
        code: Hash of the source that this kind of step runs.
        packages: Installed versions.
        identity: Hashes of model and data.
        threads: Threads that torch may use; a sum in another order is another number.
        folder: The working folder that relative paths start from.
    """

    study: str
    out: str
    step: str
    kind: str
    key: str
    code: str
    packages: dict[str, str]
    identity: dict[str, Any]
    threads: int
    folder: str


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    """Run one step; this is what a worker does.

    Returns:
        ``{"seconds", "worker", "pid"}``, or ``{"error"}``: one line that a user can mend.
    """
    told = Order(**order)
    worker = socket.gethostname()
    try:
        seconds = _carry_out(told, worker)
    except InputError as error:
        return {"error": str(error)}
    return {"seconds": seconds, "worker": worker, "pid": os.getpid()}


def _carry_out(told: Order, worker: str) -> float:
    import torch

    if code_hash(told.kind) != told.code:
        raise InputError(
            f"worker {worker}: runs other code of preln than this machine: install the same there"
        )
    mine = package_versions()
    for name in sorted(mine.keys() | told.packages.keys()):
        if mine.get(name) != told.packages.get(name):
            here, there = told.packages.get(name, "none"), mine.get(name, "none")
            raise InputError(
                f"worker {worker}: has {name} {there}, this machine {here}: install the same there"
            )
    with contextlib.suppress(OSError):  # another machine need not have it
        os.chdir(told.folder)
    lab = _lab(told.study, told.out)
    if told.kind == "verify":  # needs no model, and perhaps has no device for one
        lab = Lab(lab.study, lab.store)
        vars(lab)["identity"] = told.identity
    steps = {step.id: step for step in build_steps(lab)}
    if lab.identity != told.identity:
        raise InputError(f"worker {worker}: finds another model or other data than this machine: {_mend()}")
    step = steps[told.step]
    gather(lab.store, _all_needs(steps, step), f"worker {worker}")
    if lab.store.inputs_hash(step) != told.key:
        raise InputError(f"worker {worker}: sees other results in {told.out} than this machine: {_mend()}")
    torch.set_num_threads(told.threads)  # last: importing transformers may raise it
    return lab.store.execute(step)


def _mend() -> str:
    return "give every machine the same files under the same paths"


@functools.lru_cache(maxsize=1)
def _lab(study: str, out: str) -> Lab:
    """A worker's own model and tokens, loaded once for all steps that it is given."""
    return Lab(Study.model_validate_json(study), open_store(out))


def _all_needs(steps: dict[str, Step], step: Step) -> list[str]:
    """Ids of all that a step reads, directly or through what it needs."""
    found: dict[str, None] = {}
    for name in step.needs:
        found |= dict.fromkeys([*_all_needs(steps, steps[name]), name])
    return list(found)


def gather(store: RunStore, step_ids: list[str], who: str) -> None:
    """Wait until results are readable here; another machine wrote them a moment ago.

    Raises:
        InputError: They do not come, or are damaged.
    """
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            return store.gather(step_ids)
        except InputError as error:
            missing = [step_id for step_id in step_ids if store.record(step_id) is None]
            if not missing:
                raise
            if time.monotonic() > deadline:
                raise InputError(
                    f"{who}: does not see {store.root / missing[0]}: name a folder that all machines share, "
                    "or an address such as s3://… as --out"
                ) from error
        time.sleep(0.5)
