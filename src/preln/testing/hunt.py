"""Running a check under Hypothesis from a program: the worst error it can find, or a counterexample.

MacIver, Hatfield-Dodds et al., "Hypothesis: a new approach to property-based testing" (2019); targeted
search after Löscher and Sagonas, "Targeted property-based testing" (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from torch import Tensor

from preln.base.errors import InputError, MissingExtraError
from preln.testing.layers import autograd_jacobian, dense_sigma
from preln.testing.modules import NORM_MODULES, NormModule
from preln.testing.properties import Worst
from preln.testing.strategies import eps_values, gains
from preln.theory import Evidence

UNCHECKED = (
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.too_slow,
    HealthCheck.large_base_example,
    HealthCheck.nested_given,
)
"""A program that asks for examples wants them, however slow or large."""
HIGHEST = 1e300
"""Stands for an infinite error: `target` takes finite numbers only."""


def hunt(
    error: Callable[..., float],
    *strategies: st.SearchStrategy[Any],
    examples: int,
    against: str,
    tolerance: float,
    start: int = 0,
) -> Evidence:
    """Search for the input with the largest error: random examples first, then changes that raise it.

    Args:
        error: from what the strategies draw, one argument each, to a relative error; NaN counts as infinite.
        strategies: what to draw.
        examples: how many to try.
        against: what is compared with what.
        tolerance: the largest error that passes.
        start: the seed.

    Returns:
        `property` evidence with `n`, the examples that ran, the largest error and the input that gave it.

    Raises:
        InputError: `examples` is below 1.
    """
    worst = Worst(against, tolerance)

    def measure(*drawn: Any) -> None:
        value = float(error(*drawn))
        value = math.inf if math.isnan(value) else value
        target(min(value, HIGHEST))
        worst.examples += 1
        if not worst.input or value > worst.error:
            worst.error, worst.input = value, _named(drawn)

    _run(measure, strategies, examples, start, phases=(Phase.generate, Phase.target))
    evidence = worst.evidence()
    detail = evidence.detail | {"found_by": "hypothesis target()", "seed": start}
    return Evidence(evidence.kind, evidence.outcome, detail)


def check_property(
    check: Callable[..., Any],
    *strategies: st.SearchStrategy[Any],
    examples: int = 200,
    against: str,
    start: int = 0,
) -> Evidence:
    """Turn a check that asserts into evidence for a claim.

    Args:
        check: takes what the strategies draw, one argument each, and raises AssertionError where the property
            fails.
        strategies: what to draw.
        examples: how many to try.
        against: what is compared with what.
        start: the seed.

    Returns:
        `counterexample` evidence with the smallest input found on which the check fails, or `property`
        evidence with the number of examples that passed.

    Raises:
        InputError: `examples` is below 1, or none of them got through the check's assumptions.
        Exception: whatever else `check` raises.
    """
    passed, last, others = 0, {}, []

    def watched(*drawn: Any) -> None:
        nonlocal passed, last
        last = _named(drawn)
        try:
            check(*drawn)
        except (AssertionError, HypothesisException):
            raise
        except Exception as error:
            others.append(error)
            raise
        passed += 1

    try:
        _run(watched, strategies, examples, start, phases=(Phase.generate, Phase.shrink))
    except AssertionError as error:
        if others:
            raise others[0] from error
        # Hypothesis runs the smallest example once more before it reports it.
        detail = {"check": against, "instance": last, "message": str(error)}
        return Evidence("counterexample", "pass", detail)
    if not passed:
        raise InputError(f"{against}: no example got through the check's assumptions, loosen them")
    return Evidence("property", "pass", {"against": against, "n": passed, "seed": start})


def _run(
    body: Callable[..., None],
    strategies: tuple[st.SearchStrategy[Any], ...],
    examples: int,
    start: int,
    phases: tuple[Phase, ...],
) -> None:
    if examples < 1:
        raise InputError(f"examples is {examples}: it must be at least 1")

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=UNCHECKED,
        phases=phases,
        report_multiple_bugs=False,
    )
    @given(st.tuples(*strategies))
    def example(drawn: tuple[Any, ...]) -> None:
        body(*drawn)

    example()


def _named(drawn: tuple[Any, ...]) -> dict[str, Any]:
    """Return what was drawn as plain data: a single dictionary by its keys, else a list."""
    only = drawn[0] if len(drawn) == 1 else None
    return plain(only) if isinstance(only, dict) else {"drawn": plain(drawn)}


def plain(value: Any) -> Any:
    """Return tensors, dataclasses and containers as data for JSON; numbers that JSON lacks as text."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


@st.composite
def module_inputs(draw: Any, d: int) -> Tensor:
    """Draw a `[d]` vector of float32 numbers, in float64, with the nasty kinds that modules can be run at.

    Huge is 1e12. In float32 the forward pass stands 1e15, whose square is still finite; but its derivative
    needs 1/s^3, which below 1e-38 is no normal number, and then backpropagation drops the rank-one term.
    """
    entries = draw(st.lists(st.floats(-100.0, 100.0, width=32), min_size=d, max_size=d))
    x = torch.tensor(entries, dtype=torch.float32)
    kind = draw(st.sampled_from(["ordinary", "zero", "constant", "one-hot", "tiny", "huge", "offset"]))
    place = draw(st.integers(0, d - 1))
    x = {
        "ordinary": lambda: x,
        "zero": lambda: torch.zeros_like(x),
        "constant": lambda: x[:1].expand(d).clone(),
        "one-hot": lambda: torch.where(torch.arange(d) == place, x, 0.0),
        "tiny": lambda: x * 1e-8,
        "huge": lambda: x * 1e10,
        "offset": lambda: x + 1000.0,
    }[kind]()
    return x.to(torch.float64)


@st.composite
def module_cases(draw: Any, max_d: int = 12) -> dict[str, Any]:
    """Draw a gain, an eps and a vector; entries of the gain below 1e-9, which float32 may lose, become 0."""
    d = draw(st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, max_d)))
    weight = draw(gains(d))
    weight = torch.where(weight.abs() < 1e-9, torch.zeros_like(weight), weight)
    return {"weight": weight, "eps": draw(eps_values()), "x": draw(module_inputs(d))}


def module_error(built: NormModule, x: Tensor) -> float:
    """Return the largest of three errors at x `[d]`: of the Jacobian, of sigma and of its bounds.

    Each is relative to |gamma|_(1)/s, and for LayerNorm to 1 + |mean|/s: subtracting a mean that is large
    against s loses that many digits in the module, not in the closed form.
    """
    layer = built.layer
    x = x.expand(*built.heads, len(x))
    actual = autograd_jacobian(built.module, x.to(built.dtype)).to(torch.float64)
    s = layer.denominator(x)
    top = torch.ones_like(s) if layer.weight is None else layer.weight.abs().amax(-1)
    unit = torch.where(top > 0, top, torch.ones_like(top)) / s
    if layer.kind == "layer_norm":
        unit = unit * (1 + x.mean(-1).abs() / s)
    dense, closed, (lower, upper) = dense_sigma(actual), layer.sigma(x), layer.bounds(x)
    errors = [(actual - layer.jacobian(x)).abs().amax((-2, -1)), (dense - closed).abs()]
    errors += [(lower - value).clamp(min=0) for value in (dense, closed)]
    errors += [(value - upper).clamp(min=0) for value in (dense, closed)]
    return float((torch.stack(errors) / unit).max())


def norm_module_evidence(names: Iterable[str], examples: int) -> list[Evidence]:
    """Hunt the worst error of each module; a module whose package is missing gives no evidence.

    Args:
        names: keys of `NORM_MODULES`, such as `RMS_MODULES`.
        examples: how many for each.
    """
    found = []
    for name in names:
        build = NORM_MODULES[name]
        try:
            tolerance = build(torch.ones(2, dtype=torch.float64), 1e-5).tolerance
        except MissingExtraError:
            continue

        def error(case: dict[str, Any], build: Any = build) -> float:
            return module_error(build(case["weight"], case["eps"]), case["x"])

        against = f"autograd of {name}: Jacobian, sigma and bounds against the closed forms"
        start = list(NORM_MODULES).index(name)
        evidence = hunt(
            error, module_cases(), examples=examples, against=against, tolerance=tolerance, start=start
        )
        found.append(evidence)
    return found
