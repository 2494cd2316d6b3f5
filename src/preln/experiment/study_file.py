"""Study files: read and checked against what this project knows, written, and their JSON schema."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from preln.base.errors import InputError
from preln.base.files import write_text
from preln.base.yaml_files import read_yaml
from preln.experiment.study import Study


def read_study(path: str | os.PathLike[str]) -> Study:
    """Read a study file.

    Raises:
        InputError: No such file, no YAML, an unknown key, a value out of range, a criterion, a recipe or a
            hypothesis that nothing here knows.
    """
    source = Path(path)
    values = read_mapping(source)
    try:
        study = Study.model_validate(_lists_to_tuples(values))
    except ValidationError as error:
        raise InputError(f"{source}: {first_problem(error)}") from error
    try:
        _check_names(study)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return study


def read_mapping(source: Path) -> dict[str, Any]:
    """The YAML mapping of a study file.

    Raises:
        InputError: No such file, or no such YAML.
    """
    try:
        values = read_yaml(source)
    except FileNotFoundError as error:
        raise InputError(f"{source}: no such file: check the path of the study") from error
    except IsADirectoryError as error:
        raise InputError(f"{source}: is a folder: name the study's YAML file") from error
    if not isinstance(values, dict):
        raise InputError(f"{source}: not a study: a mapping with name, model, data, … is expected")
    return values


def first_problem(error: ValidationError) -> str:
    """One line for the first thing that a validation found, with the place and the mend."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in ("by tokens", "by rows"))
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key: remove it or mend its name"
    if problem["type"] == "missing":
        return f"{place}: missing: add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def study_text(study: Study) -> str:
    """The resolved study as YAML, every default spelt out."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def write_study(study: Study, path: str | os.PathLike[str]) -> Path:
    """Write the resolved study as YAML, atomically."""
    return write_text(path, study_text(study))


def study_schema() -> str:
    """The JSON schema of a study file, for editors that check YAML while it is written."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Study.model_json_schema()}
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _check_names(study: Study) -> None:
    """Criteria, protections, recipes, answers and hypotheses are known ones."""
    from preln.data import GOLD
    from preln.experiment.statistics.verdicts import STATISTICS
    from preln.heal import get_recipe
    from preln.prune.plan import protected_blocks
    from preln.prune.registry import choose_metrics

    choose_metrics(study.prune.metrics)
    for cut in study.prune.cuts:
        protected_blocks(cut.protect, 1)
    for entry in study.heal:
        get_recipe(entry.recipe)
    for names in study.answers.groups.values() if study.answers else ():
        if unknown := [name for name in names if name not in GOLD]:
            raise InputError(f"answers: {unknown[0]!r} is unknown: choose from {', '.join(GOLD)}")
    for hypothesis in study.hypotheses:
        known = STATISTICS.get(hypothesis.id)
        if known is None:
            ids = ", ".join(sorted(STATISTICS))
            raise InputError(f"hypotheses: {hypothesis.id} cannot be decided: use one of {ids}")
        if hypothesis.statistic not in known:
            raise InputError(
                f"hypotheses: {hypothesis.id} has no statistic {hypothesis.statistic!r}: "
                f"use one of {', '.join(sorted(known))}"
            )
        if hypothesis.model is not None and not known[hypothesis.statistic].of_model:
            raise InputError(
                f"hypotheses: {hypothesis.statistic} is not about one pruned model: leave model out"
            )


def _lists_to_tuples(value: Any) -> Any:
    """YAML's lists as tuples, which frozen models hold."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(item) for item in value)
    return value
