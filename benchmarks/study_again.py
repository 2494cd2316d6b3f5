"""A study that was disturbed ends with the tables of one that was not.

Run `python benchmarks/study_again.py STUDY RUN --out FOLDER [--kills 10 | --ray] [--json]`, where RUN is an
undisturbed run of the study. FOLDER gets a run of its own, and is compared with RUN in the end, file by file,
bit by bit, apart from times and provenance.

- `--kills N`: the run is killed (SIGKILL, with its children) at N random moments of the time that RUN took,
  and each time the same command goes on in the folder that is left.
- `--ray`: the steps go to a cluster of two nodes of one core each on this machine; when half of them are
  finished, the worker that is busy on the second node is killed.

What was done is noted beside FOLDER, so that this program may be stopped and started again. With `--store`
the outcome is kept in `benchmarks/results/`, for `benchmarks/reliability.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kills import contents, finish, kill_after

from preln.base.files import read_json, write_json
from preln.base.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def finished(run: Path) -> int:
    """How many steps of a run are finished."""
    return len(list(run.glob("*/step.json")))


def seconds(run: Path) -> float:
    """What the steps of a run took, in seconds."""
    return sum(read_json(path)["seconds"] for path in run.glob("*/step.json"))


def killed_run(study: str, run: Path, out: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Carry a study out, killed at random moments; the moments, and how much was finished at each."""
    notes = out.with_name(f"{out.name}.kills.json")
    words = ("run", study, "--out", str(out))
    former = read_json(notes) if notes.is_file() else {}
    rng, whole = random.Random(seed), seconds(run)
    moments = former.get("moments") or sorted(rng.uniform(0.0, whole) for _ in range(kills))
    done = former.get("killed", [])
    for number in range(len(done), kills):
        lived = moments[number] - (moments[number - 1] if number else 0.0)
        if not kill_after(words, lived):
            break  # it is finished: there is nothing more to kill
        parts = sorted(p.name.partition("-")[0] for p in out.glob(".work/*") if p.is_dir())
        done.append({"seconds": round(lived, 1), "finished": finished(out), "begun": parts})
        write_json(notes, {"moments": moments, "killed": done})
        print(f"killed after {lived:.0f} s with {done[-1]['finished']} steps finished", file=sys.stderr)
    _, error = finish(words)
    if error:
        raise SystemExit(f"the run did not end: {error}")
    return done


def ray_run(study: str, run: Path, out: Path) -> list[dict[str, Any]]:
    """Carry a study out on two nodes, and kill a busy worker once; who was killed, and when."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    from preln.experiment import Engine, read_study, run_study

    notes = out.with_name(f"{out.name}.ray.json")
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    half, done = finished(run) // 2, read_json(notes)["killed"] if notes.is_file() else []

    def watch() -> None:
        raylet = second.all_processes["raylet"][0].process.pid
        while not done:
            found = _busy(raylet) if finished(out) >= half else None
            if found is not None:
                found[0].send_signal(signal.SIGKILL)
                done.append({"worker": found[1], "finished": finished(out)})
                write_json(notes, {"killed": done})
            time.sleep(1.0)

    threading.Thread(target=watch, daemon=True).start()
    try:
        run_study(read_study(study), out, Engine("ray"))
    finally:
        ray.shutdown()
        cluster.shutdown()
    return done


def _busy(raylet: int) -> tuple[Any, str] | None:
    """A worker below a node's process that has been on a step for some seconds, and the step."""
    import psutil

    for process in psutil.Process(raylet).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
            if name.startswith("ray::preln ") and process.cpu_times().user > 5:
                return process, name.removeprefix("ray::preln ").strip()
        except psutil.Error:
            continue
    return None


def differences(run: Path, out: Path) -> list[str]:
    """Files that one run has and the other has not, or has otherwise; and what was left half-written."""
    first, second = contents(run), contents(out)
    left = [str(path.relative_to(out)) for path in out.rglob("*.part")]
    return left + sorted(n for n in first.keys() | second.keys() if first.get(n) != second.get(n))


def main() -> int:
    """Disturb a study and compare; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("undisturbed", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.ray:
        killed = ray_run(arguments.study, arguments.undisturbed, arguments.out)
    else:
        killed = killed_run(
            arguments.study, arguments.undisturbed, arguments.out, arguments.kills, arguments.seed
        )
    found = {
        "study": Path(arguments.study).as_posix(),
        "how": "two nodes, a worker killed" if arguments.ray else "killed and continued",
        "steps": finished(arguments.out),
        "files": len(contents(arguments.out)),
        "killed": killed,
        "differences": differences(arguments.undisturbed, arguments.out),
    }
    if arguments.store:
        name = "study-ray" if arguments.ray else "study-killed"
        how = "--ray" if arguments.ray else f"--kills {arguments.kills}"
        command = f"python benchmarks/study_again.py {found['study']} RUN --out FOLDER {how}"
        write_json(RESULTS / f"{name}.json", provenance(command=command) | {"result": found})
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=1))
    return int(bool(found["differences"]))


if __name__ == "__main__":
    sys.exit(main())
