"""The same study here and on a cluster of two nodes: same tables, also where workers and nodes are lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from preln.base.errors import InputError, MissingExtraError
from preln.base.files import hash_tree
from preln.experiment import Engine, RunStore, engines, read_study, run_study
from preln.experiment.lab import Lab
from preln.experiment.pipeline import build_steps
from preln.experiment.store import WORK
from preln.models import load_model

pytestmark = pytest.mark.integration
VOLATILE = ("step.json", "manifest.json", "checksums.json", "training.parquet", "result.json")
TIMED = ("seconds", "peak_memory_bytes", "forward_seconds_per_token")
OBJECTS = 100_000_000
HEALED = "heal-reverse-2-partial-3"
STEPS = 600  # seconds of healing: a cancellation that is not heard is repeated before they have passed


def results(run):
    """Hashes of all result files but those that hold times, and the numbers of those."""
    found = {
        name: value
        for name, value in hash_tree(run).items()
        if not name.endswith(VOLATILE) and not name.startswith(".")
    }
    for path in sorted(run.glob("*/result.json")):
        found[path.parent.name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in TIMED}
    return found


@pytest.fixture
def study(study_values, write_yaml):
    study_values["heal"][0] |= {"steps": STEPS, "models": ["reverse-2"]}
    return read_study(write_yaml(study_values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run folder of the undisturbed local run, and its results once there are any."""
    return SimpleNamespace(folder=tmp_path_factory.mktemp("whole") / "run", results=None)


@pytest.fixture
def expected(study, whole):
    if whole.results is None:
        run_study(study, whole.folder)
        whole.results = results(whole.folder)
    return whole.results


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one core each on this machine; their workers have a cache of their own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    former = os.environ.get("PRELN_CACHE")
    os.environ["PRELN_CACHE"] = str(tmp_path_factory.mktemp("workers"))
    try:
        node = {"num_cpus": 1, "object_store_memory": OBJECTS, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        second = made.add_node(num_cpus=1, object_store_memory=OBJECTS)
    finally:
        os.environ.pop("PRELN_CACHE")
        os.environ |= {} if former is None else {"PRELN_CACHE": former}
    ray.init(address=made.address, log_to_driver=False)
    yield SimpleNamespace(ray=ray, made=made, second=second)
    ray.shutdown()
    made.shutdown()


def working(step_start, below=None):
    """Processes of workers that carry out such a step, below one process or anywhere."""
    import psutil

    root = psutil.Process() if below is None else psutil.Process(below)
    found = []
    for process in root.children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::preln {step_start}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def when(condition, act, limit=120.0):
    """Act once, from another thread, as soon as a condition gives something; returns the list of acts."""
    acted = []

    def watch():
        end = time.monotonic() + limit
        while time.monotonic() < end and not acted:
            found = condition()
            if found:
                act(found)
                acted.append(found)
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    return acted


def test_two_nodes_give_the_tables_of_one_process(study, expected, cluster, tmp_path):
    summary = run_study(study, tmp_path / "run", Engine("ray"))
    assert len(summary["ran"]) == summary["steps"]
    assert summary["ran"] == json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"]
    assert results(tmp_path / "run") == expected
    assert run_study(study, tmp_path / "run", Engine("ray"))["ran"] == []
    assert run_study(study, tmp_path / "run")["ran"] == []  # the local engine takes them as its own


def test_a_killed_worker_is_replaced_and_goes_on(study, expected, cluster, tmp_path):
    run = tmp_path / "run"

    def halfway():
        begun = list(run.glob(f"{WORK}/{HEALED}-*/training/step-*"))
        return working(HEALED) if begun else []

    killed = when(halfway, lambda processes: processes[0].send_signal(signal.SIGKILL))
    summary = run_study(study, run, Engine("ray", retries=2))
    assert killed
    assert HEALED in summary["ran"]
    assert results(run) == expected
    assert not list(run.glob(".*.part")) and not list((run / WORK).glob("*.lock"))


def test_an_address_keeps_what_workers_make(study, expected, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PRELN_CACHE", str(tmp_path / "cache"))
    run_study(study, f"file://{tmp_path}/kept", Engine("ray"))
    assert results(tmp_path / "kept") == expected
    assert not list((tmp_path / "kept").rglob(".*.part"))


def test_an_interruption_cancels_and_keeps_what_is_finished(study, expected, cluster, tmp_path, monkeypatch):
    original = cluster.ray.wait
    calls = []

    def interrupted(running, **kwargs):
        """As soon as healing begins."""
        while not calls:
            if working(HEALED):
                calls.append(1)
                raise KeyboardInterrupt
            found = original(running, **{**kwargs, "timeout": 0.02})
            if found[0]:
                return found
        return original(running, **kwargs)

    monkeypatch.setattr(cluster.ray, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "run", Engine("ray"))
    assert not working("")
    assert not (tmp_path / "run" / HEALED).exists()
    summary = run_study(study, tmp_path / "run")
    assert "prune-reverse-2" not in summary["ran"]
    assert results(tmp_path / "run") == expected


class Deaf:
    """Stands for a cluster whose tasks do not hear so many of the first cancellations."""

    def __init__(self, drops):
        self.drops, self.calls = drops, []

    def cancel(self, task, *, force):
        self.calls.append((task, force))

    def wait(self, tasks, *, num_returns, timeout):
        ended = [
            task
            for task in tasks
            if (task, True) in self.calls or self.calls.count((task, False)) > self.drops
        ]
        return ended, [task for task in tasks if task not in ended]


@pytest.mark.parametrize(("drops", "forced"), [(0, False), (3, False), (10**9, True)])
def test_a_cancellation_that_is_not_heard_is_repeated_and_then_forced(drops, forced, monkeypatch):
    from preln.experiment import ray_engine

    monkeypatch.setattr(ray_engine, "_CANCEL_S", 0.3 if forced else 600.0)
    ray = Deaf(drops)
    schedule = ray_engine._Schedule(ray, [], None, "", Engine("ray"), running={"a": None, "b": None})
    schedule._cancel()
    assert (("a", True) in ray.calls) is forced and (("b", True) in ray.calls) is forced
    assert forced or ray.calls.count(("a", False)) == drops + 1


def test_a_lost_node_loses_no_result(study, expected, cluster, tmp_path):
    """Last of the tests on two nodes: one remains."""
    raylet = cluster.second.all_processes["raylet"][0].process.pid
    lost = when(
        lambda: working("heal-", below=raylet),
        lambda _: cluster.made.remove_node(cluster.second, allow_graceful=False),
    )
    run_study(study, tmp_path / "run", Engine("ray"))
    assert lost
    assert results(tmp_path / "run") == expected


def test_a_step_that_fails_says_so_in_one_line(study_values, write_yaml, tmp_path):
    study_values["prune"]["drop"] = [6]
    study_values |= {"heal": [], "hypotheses": []}
    words = ["run", str(write_yaml(study_values)), "--out", str(tmp_path / "run"), "--engine", "ray"]
    done = subprocess.run(
        [sys.executable, "-m", "preln.cli", *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("preln: ") and "drop 6" in last
    for kept in ("probe", "score", "damage"):  # what ran beside it was let finish
        assert (tmp_path / "run" / kept / "step.json").is_file()
    assert not list((tmp_path / "run").glob("*prune*"))


@pytest.fixture
def order(study, tmp_path):
    """What a worker would be told about the first step, made here."""
    from preln.base.provenance import package_versions
    from preln.experiment.ray_worker import Order

    store = RunStore(tmp_path / "run")
    lab = Lab(study, store)
    step = build_steps(lab)[0]
    told = Order(
        study=study.model_dump_json(),
        out=str(store.root),
        step=step.id,
        kind=step.kind,
        key=store.inputs_hash(step),
        code=step.inputs["code"],
        packages=package_versions(),
        identity=lab.identity,
        threads=1,
        folder=os.getcwd(),
    )
    return asdict(told)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("code", "0", "other code of preln"),
        ("packages", {"torch": "0.1"}, "this machine"),
        ("identity", {}, "another model or other data"),
        ("key", "0", "sees other results"),
    ],
)
def test_a_worker_that_differs_is_refused_by_name(order, field, value, message):
    import socket

    from preln.experiment.ray_worker import carry_out

    answer = carry_out(order | {field: value})
    assert answer["error"].startswith(f"worker {socket.gethostname()}: ") and message in answer["error"]
    assert not os.path.exists(order["out"])
    assert "error" not in carry_out(order)


def test_what_no_machine_has_is_refused_on_a_cluster_that_does_not_grow(study, capsys):
    from preln.experiment.ray_engine import _check_room

    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 99.0}}]
    ray = SimpleNamespace(nodes=lambda: nodes)
    lab, steps = SimpleNamespace(study=study), [SimpleNamespace(kind="probe")]
    _check_room(ray, steps, lab, Engine("ray", cpus=4))
    with pytest.raises(InputError, match=r"asks for 5 CPU and 0 GPU"):
        _check_room(ray, steps, lab, Engine("ray", cpus=5))
    _check_room(ray, steps, lab, Engine("ray", cpus=5, address="head:6379"))
    assert "waiting" in capsys.readouterr().err


def test_a_step_asks_for_threads_and_where_the_device_is_one_a_gpu(study):
    import torch

    from preln.experiment.ray_engine import resources

    assert resources(study, "probe", Engine("ray")) == (torch.get_num_threads(), 0)
    there = study.model_copy(update={"device": "cuda:0"})
    assert resources(there, "probe", Engine("ray", cpus=3)) == (3, 1)
    assert resources(there, "probe", Engine("ray", gpus=0.5))[1] == 0.5
    assert resources(there, "verify", Engine("ray"))[1] == 0  # symbols need none


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "slurm"}, "unknown"),
        ({"address": "head:6379"}, "only for --engine ray"),
        ({"name": "ray", "retries": -1}, "at least 0"),
    ],
)
def test_engines_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Engine(**settings)


def test_a_missing_ray_names_its_extra(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"preln\[ray\]"):
        run_study(study, tmp_path / "run", Engine("ray"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "127.0.0.1:99999999"])
def test_an_address_where_nothing_answers_is_refused_at_once(study, tmp_path, address):
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="nothing answers") as error:
        run_study(study, tmp_path / "run", Engine("ray", address=address))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_driver_of_a_cluster_keeps_no_model(study, tmp_path):
    store = RunStore(tmp_path)
    there = study.model_copy(update={"device": "cuda"})
    lab = engines.describing_lab(there, store, Engine("ray"))
    assert "_loaded" not in vars(lab) and lab.study.device == "cuda"
    here = engines.describing_lab(study, store, engines.LOCAL)
    assert lab.identity == here.identity and "_loaded" in vars(here)


def test_a_study_travels_to_a_worker_unchanged(study, study_values, write_yaml):
    from preln.experiment.study import Study

    assert Study.model_validate_json(study.model_dump_json()) == study
    study_values["heal"][1] |= {"learning_rate": [1e-5, 1e-3], "seeds": [0, 3]}
    grid = read_study(write_yaml(study_values))
    assert Study.model_validate_json(grid.model_dump_json()) == grid


def test_device_map_reaches_the_loader_and_the_key_of_a_result(study, tmp_path, monkeypatch):
    from preln.experiment import lab as module

    told = []

    def load(name, **keywords):
        told.append(keywords.get("device_map"))
        return load_model(name)

    monkeypatch.setattr(module, "load_model", load)
    spread = study.model_copy(update={"device_map": "auto"})
    steps = [build_steps(Lab(each, RunStore(tmp_path)))[0] for each in (study, spread)]
    assert told == [None, "auto"]
    assert steps[1].inputs == steps[0].inputs | {"device_map": "auto"}
