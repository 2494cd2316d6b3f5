"""What the studies for larger machines take, and how near the estimate comes to a committed run.

Run `python benchmarks/estimate.py [--json]`. Nothing is loaded but configurations. The first table lists
every study under `experiments/ready` on every machine asked for: time step after step and, with several
devices, side by side; the largest memory of a step, the disk it leaves, and how many of its steps fit no
single device. The second compares the estimate on `cpu-2` with the seconds of the committed `quickstart` run,
for every step above two seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from preln.base.files import read_json
from preln.experiment import read_study
from preln.experiment.estimate.estimate import estimate

ROOT = Path(__file__).resolve().parents[1]
LEAST = 2.0


def ready(machines: list[str]) -> list[dict[str, Any]]:
    """Return totals of every study on every machine."""
    found = []
    for path in sorted((ROOT / "experiments" / "ready").glob("*.yaml")):
        study = read_study(path)
        for machine in machines:
            each = estimate(study, machine)
            wide = sum(step["devices"] > 1 for step in each["steps"])
            row = {"study": path.stem, "hardware": machine, "steps": len(each["steps"]), "wide": wide}
            found.append(row | each["totals"])
    return found


def compared() -> list[dict[str, Any]]:
    """Return estimate and measurement of the committed run's steps above two seconds."""
    run = ROOT / "experiments" / "results" / "quickstart"
    rows = []
    for step in estimate(read_study(run / "config.yaml"), "cpu-2")["steps"]:
        measured = float(read_json(run / step["id"] / "step.json")["seconds"])
        if measured > LEAST:
            rows.append({"step": step["id"], "estimate": step["seconds"], "measured": measured})
    return rows


def main() -> None:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hardware", nargs="+", default=["h100-80gb", "8xh100-80gb"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    studies, steps = ready(arguments.hardware), compared()
    if arguments.json:
        print(json.dumps({"ready": studies, "quickstart": steps}))
        return
    print(
        f"{'study':24}{'hardware':14}{'steps':>6}{'hours':>8}{'beside':>8}{'GB':>7}{'disk GB':>9}{'wide':>6}"
    )
    for row in studies:
        hours, beside = row["seconds"] / 3600, row["seconds_side_by_side"] / 3600
        print(
            f"{row['study']:24}{row['hardware']:14}{row['steps']:6}{hours:8.1f}{beside:8.1f}"
            f"{row['memory'] / 1e9:7.0f}{(row['disk'] + row['scratch']) / 1e9:9.0f}{row['wide']:6}"
        )
    print(f"\n{'step of quickstart':44}{'estimate':>9}{'measured':>9}{'ratio':>7}")
    for row in steps:
        ratio = row["estimate"] / row["measured"]
        print(f"{row['step']:44}{row['estimate']:9.1f}{row['measured']:9.1f}{ratio:7.2f}")


if __name__ == "__main__":
    main()
