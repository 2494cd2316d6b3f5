"""Steps of a study as tasks of a Ray cluster, with the results that one process would have stored."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preln.base.errors import InputError, require
from preln.base.provenance import package_versions
from preln.experiment.engines import Engine, say
from preln.experiment.lab import Lab
from preln.experiment.ray_worker import Order, carry_out, gather
from preln.experiment.sections import Resources
from preln.experiment.store import Step
from preln.experiment.study import Study

RETRIES = 3
_STORE_BYTES = 100_000_000  # tasks pass a few lines of text
_CANCEL_S = 20.0  # for a cancelled step to put its things away
_AGAIN_S = 1.0  # between one cancellation of a step and the next
# what a worker takes over from this process: numbers and sources may depend on it
_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_VERBOSITY",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "PRELN_DATA",
)


def run_on_ray(steps: list[Step], lab: Lab, out: str | os.PathLike[str], engine: Engine) -> list[str]:
    """Give every unfinished step to a worker as soon as what it needs is finished.

    A step whose worker was lost is given to another, which continues from the step's checkpoints where it
    finds them. An error that a user can mend is not tried again: running steps are let finish, then it is
    raised. An interruption cancels them; what is finished is kept.

    Args:
        steps: Every step, dependencies first.
        lab: The study and its hashes.
        out: The run folder or address.
        engine: Address, retries and resources.

    Raises:
        InputError: Ray is missing or cannot be reached, no node has the resources, a worker differs, or
            whatever a step says.
    """
    ray = require("ray", extra="ray")
    with _joined(ray, engine):
        _check_room(ray, steps, lab, engine)
        return _Schedule(ray, steps, lab, out, engine).run()


@dataclass
class _Schedule:
    """What is waiting, running and done."""

    ray: Any
    steps: list[Step]
    lab: Lab
    out: str | os.PathLike[str]
    engine: Engine
    running: dict[Any, Step] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)

    def run(self) -> list[str]:
        """Until every step is done, or one has failed and the running ones have ended."""
        waiting = {step.id: step for step in self.steps}
        failure: Exception | None = None
        try:
            while waiting or self.running:
                if failure is None:
                    self._start(waiting)
                if not self.running:
                    break
                ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=1.0)
                for task in ready:
                    problem = self._end(task)
                    if problem is not None and failure is None:
                        failure = problem
                        if self.running:
                            say(f"{problem}\nwaiting for {len(self.running)} running steps")
        except BaseException:
            self._cancel()
            raise
        if failure is not None:
            raise failure
        return [step.id for step in self.steps if step.id in self.ran]

    def _start(self, waiting: dict[str, Step]) -> None:
        """Send out what is ready; a kept step may make others ready."""
        while ready := [step for step in waiting.values() if self.done.issuperset(step.needs)]:
            for step in ready:
                del waiting[step.id]
                if self.lab.store.is_finished(step):
                    self.done.add(step.id)
                    say(f"{self._place(step)}: kept")
                else:
                    self.running[self._submit(step)] = step
                    say(f"{self._place(step)}: …")

    def _submit(self, step: Step) -> Any:
        import torch

        threads = torch.get_num_threads()
        cpus, gpus = resources(self.lab.study, step.kind, self.engine)
        order = Order(
            study=self.lab.study.model_dump_json(),
            out=str(self.out) if "://" in str(self.out) else str(Path(self.out).resolve()),
            step=step.id,
            kind=step.kind,
            key=self.lab.store.inputs_hash(step),
            code=step.inputs["code"],
            packages=package_versions(),
            identity=self.lab.identity,
            threads=threads,
            folder=os.getcwd(),
        )
        environment = {name: os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)}
        task = self.ray.remote(carry_out).options(
            name=f"preln {step.id}",
            num_cpus=cpus,
            num_gpus=gpus,
            max_retries=RETRIES if self.engine.retries is None else int(self.engine.retries),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)} | environment},
        )
        return task.remote(asdict(order))

    def _end(self, task: Any) -> Exception | None:
        """Note what became of a step; returns what went wrong with it."""
        step = self.running.pop(task)
        errors = self.ray.exceptions
        try:
            told = self.ray.get(task)
        except errors.RayTaskError as error:  # a fault in a step, with the worker's traceback
            if "failed to import" in str(error):
                return InputError("a worker cannot import preln: install the same version on every machine")
            return error
        except errors.RayError as error:
            kind, retries = (
                type(error).__name__,
                RETRIES if self.engine.retries is None else self.engine.retries,
            )
            return InputError(
                f"step {step.id}: its worker was lost, also after {retries} retries ({kind}): look at the "
                "machine's memory and logs, then run the same command again"
            )
        if "error" in told:
            return InputError(told["error"])
        gather(self.lab.store, [step.id], "this machine")
        self.done.add(step.id)
        self.ran.add(step.id)
        say(f"{self._place(step)}: {told['seconds']:.1f} s on {told['worker']}")
        return None

    def _cancel(self) -> None:
        """End what is running, gently at first: a step removes what it has begun."""
        tasks, end = list(self.running), time.monotonic() + _CANCEL_S
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            while tasks and time.monotonic() < end:
                for task in tasks:  # again and again: a finaliser may swallow a KeyboardInterrupt
                    self.ray.cancel(task, force=False)
                _, tasks = self.ray.wait(tasks, num_returns=len(tasks), timeout=_AGAIN_S)
        if tasks:
            with contextlib.suppress(Exception):
                for task in tasks:
                    self.ray.cancel(task, force=True)
                self.ray.wait(tasks, num_returns=len(tasks), timeout=_CANCEL_S)

    def _place(self, step: Step) -> str:
        return f"[{self.steps.index(step) + 1}/{len(self.steps)}] {step.id}"


def resources(study: Study, kind: str, engine: Engine) -> tuple[float, float]:
    """CPU cores and GPUs that a kind of step asks for."""
    import torch

    placed = study.device_map != "none" or study.device == "auto" or study.device.startswith("cuda")
    named: dict[str, Resources] = dict(study.resources)  # pyright: ignore
    own = named.get(kind, Resources())
    usual = 1.0 if placed else 0.0
    wanted = usual if engine.gpus is None else engine.gpus
    gpus = own.gpus if own.gpus is not None else wanted * (kind != "verify")
    cpus = torch.get_num_threads() if engine.cpus is None else engine.cpus
    return cpus if own.cpus is None else own.cpus, gpus


def _check_room(ray: Any, steps: list[Step], lab: Lab, engine: Engine) -> None:
    """Say what no node can give, which Ray would wait for without end.

    Raises:
        InputError: On a cluster of this run's own, which will not grow.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind in dict.fromkeys(step.kind for step in steps):
        cpus, gpus = resources(lab.study, kind, engine)
        if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            continue
        line = f"a {kind} step asks for {cpus:g} CPU and {gpus:g} GPU, and no machine of the cluster has them"
        if engine.address is None:
            raise InputError(f"{line}: give less by --cpus and --gpus, or another --address")
        return say(f"{line} yet: waiting for one")


@contextlib.contextmanager
def _joined(ray: Any, engine: Engine) -> Iterator[None]:
    """Join a cluster, or start one on this machine, quietly; one that the caller has joined is left so.

    Raises:
        InputError: Nothing answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = engine.address or os.environ.get("RAY_ADDRESS") or "local"
    own = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--address {address}: no Ray cluster answers ({type(error).__name__}): start one of the same "
            "version with `ray start --head`, or leave --address out"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
