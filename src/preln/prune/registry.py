"""The registry of criteria: names, what they have to know, and the order of removal that they give."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preln.base.errors import InputError
from preln.prune.evidence import NEEDS, Array

# criteria over attention and MLP halves: one row a half, not one a block
HALF_METRICS = (
    "llm_drop_attention",
    "llm_drop_mlp",
    "finercut",
    "finercut_euclidean",
    "finercut_angular",
)


@dataclass(frozen=True)
class Ranked:
    """Scores of blocks (or halves), and the order in which they go: what the scores alone do not tell."""

    scores: Array
    order: Sequence[int]

    @property
    def ranks(self) -> np.ndarray:
        """Place of every block in the order, 0 first."""
        result = np.empty(len(self.order), dtype=np.int64)
        result[list(self.order)] = np.arange(len(self.order))
        return result


@dataclass(frozen=True)
class Criterion:
    """A named importance of blocks.

    Attributes:
        name: Its name.
        needs: What it has to know: entries of ``NEEDS``.
        function: From :class:`~preln.prune.evidence.Evidence` (shared) or
            :class:`~preln.prune.evidence.Request` (not shared) to one score a block, the lowest removed
            first, or to a :class:`Ranked`.
        shared: Whether the evidence comes from passes that criteria share: those are ``"all"``. The others
            run the model by themselves, and are asked for by name.
    """

    name: str
    needs: frozenset[str]
    function: Callable[[Any], Array | Ranked]
    shared: bool = True

    @property
    def summary(self) -> str:
        """First line of the function's documentation."""
        return (self.function.__doc__ or "").strip().splitlines()[0]

    def rank(self, source: Any) -> Ranked:
        """Scores and order from evidence or request.

        Raises:
            InputError: A score that is not finite, naming the block.
        """
        found = self.function(source)
        result = found if isinstance(found, Ranked) else Ranked(found, lowest_first(found))
        if not np.isfinite(result.scores).all():
            block = int(np.argmin(np.isfinite(result.scores)))
            raise InputError(
                f"{self.name}: block {block} has no finite score: check the weights or the dtype"
            )
        return result


class Registry(dict[str, Criterion]):
    """Criteria by name; ``METRIC@k`` is made on demand: remove k by METRIC, score again, repeat."""

    def __missing__(self, name: str) -> Criterion:
        """The iterative version of a one-shot criterion."""
        match = re.fullmatch(r"(\w+)@([1-9]\d{0,8})", name, flags=re.ASCII)
        if match is None or match[1] not in self:
            raise KeyError(name)
        from preln.prune.iterative import iterative

        return iterative(self[match[1]], int(match[2]))


CRITERIA = Registry()


def criterion(
    name: str, *needs: str, shared: bool = True
) -> Callable[[Callable[[Any], Array | Ranked]], Callable[[Any], Array | Ranked]]:
    """Register a function as the criterion ``name``; ``needs`` are entries of ``NEEDS``."""
    unknown = set(needs) - set(NEEDS)
    if unknown or name in CRITERIA:
        raise ValueError(f"criterion {name!r}: registered twice, or unknown needs {unknown}")

    def register(function: Callable[[Any], Array | Ranked]) -> Callable[[Any], Array | Ranked]:
        CRITERIA[name] = Criterion(name, frozenset(needs), function, shared)
        return function

    return register


def lowest_first(scores: Array) -> list[int]:
    """Order of removal: lowest score first, the deeper block first among equals.

    >>> lowest_first(np.array([0.5, 0.1, 0.1]))
    [2, 1, 0]
    """
    return np.lexsort((-np.arange(len(scores)), scores)).tolist()


def split_names(metrics: str | Iterable[str], everything: Iterable[str]) -> list[str]:
    """Names without repetition from a comma-separated string or a list; ``"all"`` stands for ``everything``.

    Raises:
        InputError: None at all.

    >>> split_names("sleb,all", ["reverse", "random"])
    ['sleb', 'reverse', 'random']
    """
    given = [m.strip() for m in metrics.split(",")] if isinstance(metrics, str) else list(metrics)
    known = list(everything)
    names = list(dict.fromkeys(name for m in given for name in (known if m == "all" else [m])))
    if not names:
        raise InputError("no metric named: name at least one, or all")
    return names


def depends_on_size(name: str) -> bool:
    """Whether what a criterion over blocks removes depends on how many are to go, beyond the first of them.

    Windows for one size are not the beginnings of windows for a larger one; greedy and iterative criteria
    stop at their size.

    >>> depends_on_size("block_influence")
    False
    """
    return bool({"windows", "token_windows"} & CRITERIA[name].needs) or not CRITERIA[name].shared


def shared_metrics() -> list[str]:
    """Criteria that share their passes: what ``"all"`` means."""
    return [name for name, each in CRITERIA.items() if each.shared]


def choose_metrics(metrics: str | Iterable[str]) -> list[str]:
    """Names of criteria over blocks; ``"all"`` are those that share their passes.

    Raises:
        InputError: A name that is not registered, one over halves, or none at all.

    >>> from preln.prune.scores import choose_metrics
    >>> choose_metrics("reverse,random,block_influence@2")
    ['reverse', 'random', 'block_influence@2']
    """
    names = split_names(metrics, shared_metrics())
    for name in names:
        if name.partition("@")[0] in HALF_METRICS:
            raise InputError(
                f"metric {name!r} ranks attention and MLP halves, not blocks: call preln.prune.score_halves"
            )
        try:
            _ = CRITERIA[name]
        except KeyError as error:
            known = ", ".join(CRITERIA)
            raise InputError(
                f"metric {name!r} is unknown: choose from {known}, METRIC@k (k at a time), or all"
            ) from error
    return names
