"""lm-eval's own tasks with their own prompts, on rows from wherever they were found."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preln.base.errors import InputError, require
from preln.data import Located, locate

# benchmark -> folder of its stock tasks inside lm-eval; reading these few is a hundred times quicker than all
_STOCK = {
    "piqa": "piqa",
    "arc": "arc",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "mmlu": "mmlu/default",
    "cmmlu": "cmmlu",
}
_WRAPPER = "preln_local_rows"
_SPLITS = ("training_split", "validation_split", "test_split")
_NAME = re.compile(r"^\W*(?:task|group)\W+:?\s*[\"']?([\w.+-]+)[\"']?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks ready to run.

    Attributes:
        tasks: What ``lm_eval.evaluator.evaluate`` takes as ``task_dict``.
        reported: Names to report, in the order asked for; a tag stands for its tasks.
        sources: For each reported name, where its rows come from and which split is evaluated.
    """

    tasks: dict[str, Any]
    reported: list[str]
    sources: dict[str, dict[str, Any]]


def load_tasks(
    names: Sequence[str], *, source: str | os.PathLike[str] = "auto", seed: int = 0
) -> LoadedTasks:
    """Build lm-eval's tasks, 0-shot unless a task says otherwise, with the stock prompts.

    Tasks of the benchmarks in ``preln.data.BENCHMARKS`` read their rows from where ``preln.data.locate``
    finds them; of the stock definition only the path and the names of absent splits are overridden. Any other
    name is passed to lm-eval as it is, and loads from the hub.

    Raises:
        InputError: A name is unknown (the message lists close ones), given twice, or its rows cannot be found
            or lack the columns that the task reads.
    """
    wanted = list(names)
    if not wanted or not all(isinstance(name, str) and name for name in wanted):
        raise InputError("tasks: name at least one lm-eval task, such as piqa")
    if twice := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise InputError(f"tasks: {twice[0]!r} is named twice: once is enough")
    require("lm_eval", extra="eval")
    index = _stock_manager().task_index
    reported = list(dict.fromkeys(member for name in wanted for member in _expand(name, index)))
    located = {name: _located(name, index, source) for name in reported if name in index}
    rest = [name for name in reported if name not in index]
    _refuse_unknown(rest, index)
    items = [_item(name, located[name], index) for name in reported if name in located]
    loaded = _build(items, rest)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    sources = {
        name: {**(located[name].record if name in located else {"kind": "hub"}), **_evaluated(name, loaded)}
        for name in reported
    }
    return LoadedTasks(loaded, reported, sources)


def leaves(name: str, loaded: dict[str, Any]) -> list[str]:
    """The single tasks that a reported name stands for: itself, or all those below a group."""
    if name in loaded["tasks"]:
        return [name]
    group = loaded.get("groups", {}).get(name)
    return [task.task_name for task in group.get_all_tasks()] if group is not None else []


def _stock_manager() -> Any:
    """A task manager over the known benchmarks only."""
    import lm_eval.tasks as stock

    root = Path(stock.__file__).parent
    return stock.TaskManager(include_defaults=False, include_path=[root / path for path in _STOCK.values()])


def _expand(name: str, index: dict[str, Any]) -> list[str]:
    """A tag's members; any other name stands for itself."""
    entry = index.get(name)
    # overriding a tag as a whole would rename its members, so they are listed one by one
    return sorted(entry.tags) if entry is not None and entry.kind.name == "TAG" else [name]


def _located(name: str, index: dict[str, Any], source: str | os.PathLike[str]) -> Located:
    """Where the rows of a stock task are, by the folder that its definition lies in."""
    yaml_path = Path(index[name].yaml_path).as_posix()
    benchmark = next(b for b, folder in _STOCK.items() if f"/tasks/{folder}/" in yaml_path)
    return locate(benchmark, source)


def _item(name: str, located: Located, index: dict[str, Any]) -> str | dict[str, Any]:
    """The group member that runs a stock task, or group of tasks, on the located rows."""
    if located.path is None:
        return name
    entry = index[name]
    key = "group" if entry.kind.name == "GROUP" else "task"
    config = entry.cfg
    if key == "group":  # its members share one template, so any of them tells the splits
        prefix = f"{name.split('_')[0]}_"
        config = next(e.cfg for n, e in index.items() if e.kind.name == "TASK" and n.startswith(prefix))
    override: dict[str, Any] = {
        key: name,
        "dataset_path": str(located.path),
        "dataset_kwargs": {"cache_dir": str(located.cache)},
    }
    for split in _SPLITS:
        if config.get(split) and config[split] not in located.splits:
            override[split] = None
    held = [
        config[split] for split in ("validation_split", "test_split") if config.get(split) in located.splits
    ]
    if not held:
        raise InputError(
            f"{name}: its rows have only the splits {', '.join(located.splits)}: none to evaluate on"
        )
    # a task whose training split is missing fails to load, even at 0 shots, unless told another for examples
    if config.get("fewshot_split", config.get("training_split")) not in located.splits:
        override["fewshot_split"] = held[0]
    return override


def _build(items: list[str | dict[str, Any]], rest: list[str]) -> dict[str, Any]:
    """Load tasks through a group definition, the only place where lm-eval lets stock fields be overridden."""
    import lm_eval.tasks as stock
    import yaml

    names = [i if isinstance(i, str) else str(i.get("task", i.get("group"))) for i in items] + rest
    with tempfile.TemporaryDirectory() as folder:
        root = Path(stock.__file__).parent
        paths = [root / path for path in _STOCK.values()]
        if items:
            text = yaml.safe_dump({"group": _WRAPPER, "task": items})
            (Path(folder) / f"{_WRAPPER}.yaml").write_text(text, encoding="utf-8")
        if rest:
            manager = stock.TaskManager(include_path=folder)
        else:
            manager = stock.TaskManager(include_defaults=False, include_path=[*paths, Path(folder)])
        try:
            loaded: dict[str, Any] = dict(manager.load([*([_WRAPPER] if items else []), *rest]))
        except Exception as error:  # datasets, jinja and lm-eval raise unrelated types for missing rows
            raise InputError(f"{', '.join(names)}: the rows cannot be used: {_first_line(error)}") from error
    loaded.get("groups", {}).pop(_WRAPPER, None)
    loaded.get("group_map", {}).pop(_WRAPPER, None)
    return loaded


def _evaluated(name: str, loaded: dict[str, Any]) -> dict[str, Any]:
    """The split that is evaluated, and what lm-eval calls the data set."""
    members = leaves(name, loaded)
    if not members:
        return {}
    config = loaded["tasks"][members[0]].config
    return {"split": config.test_split or config.validation_split}


def _refuse_unknown(names: list[str], index: dict[str, Any]) -> None:
    """Raise for names that lm-eval does not define, without building its full index, which takes long."""
    if not names:
        return
    import lm_eval.tasks as stock

    known = set(index)
    mentioned: set[str] = set()
    for path in Path(stock.__file__).parent.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="ignore")
        known.update(_NAME.findall(text))
        mentioned.update(name for name in names if name in text)
    for name in names:
        if name not in known and name not in mentioned:
            close = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists the names"
            raise InputError(f"{name!r}: no such lm-eval task: {hint}")


def _first_line(error: Exception) -> str:
    """One line of an error that may have many."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
