"""The checks of pruning and similarity pass, and notice wrong formulas and bounds."""

import pytest
import torch

from preln.testing.checks import pruning, similarity

PROPERTIES = pruning.PROPERTIES | similarity.PROPERTIES


def outcomes(id, rounds=2):
    return [e.outcome for e in PROPERTIES[id](rounds)]


@pytest.mark.parametrize("id", PROPERTIES)
def test_passes(id):
    found = PROPERTIES[id](2)
    assert found and all(e.kind == "property" and e.passed and e.detail["n"] > 0 for e in found), found


def test_telescope_notices_a_missing_update(monkeypatch):
    honest = pruning.hidden_states
    monkeypatch.setattr(
        pruning,
        "hidden_states",
        lambda blocks, x: honest(blocks[:-1] if len(blocks) == 6 else blocks, x),
    )
    assert outcomes("PRN-TELESCOPE") == ["fail"]


def test_first_order_notices_the_wrong_place(monkeypatch):
    """The gradient where the block reads for the gradient where it writes."""
    honest = pruning._slope
    monkeypatch.setattr(pruning, "_slope", lambda loss: honest(lambda t: loss(1 + t)))
    assert outcomes("PRN-FIRST-ORDER")[0] == "fail"


def test_first_order_notices_another_stack(monkeypatch):
    honest = pruning.hidden_states
    monkeypatch.setattr(
        pruning,
        "hidden_states",
        lambda blocks, x: honest(blocks[:-1] if len(blocks) == 3 else blocks, x),
    )
    assert outcomes("PRN-FIRST-ORDER")[1] == "fail"


@pytest.mark.parametrize(("factor", "notices"), [(1.01, (3,)), (0.9, (2, 3))])
def test_remainder_notices_wrong_constants(factor, notices, monkeypatch):
    """The form is symmetric, and beta its largest absolute eigenvalue."""
    honest = torch.linalg.eigh
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda m: (lambda values, vectors: (factor * values, vectors))(*honest(m))
    )
    monkeypatch.setattr(pruning, "dense_sigma", lambda m: factor * torch.linalg.svdvals(m)[..., 0])
    found = outcomes("PRN-FIRST-ORDER", 20)
    assert all(found[k] == "fail" for k in notices), found


@pytest.mark.parametrize(("power", "notices"), [(1.1, 1), (0.1, 0)])
def test_bound_of_a_drop_notices_wrong_constants(power, notices, monkeypatch):
    honest = pruning.prod
    monkeypatch.setattr(pruning, "prod", lambda factors: honest(factors) ** power)
    assert outcomes("PRN-BOUND")[notices] == "fail"


@pytest.mark.parametrize(("factor", "notices"), [(1.01, (1,)), (0.3, (0, 1))])
def test_head_bound_notices_another_factor(factor, notices, monkeypatch):
    honest = pruning._head_bound
    monkeypatch.setattr(pruning, "_head_bound", lambda *a: factor * honest(*a))
    assert all(outcomes("PRN-HEAD")[k] == "fail" for k in notices)


def test_head_bound_notices_a_forgotten_gain(monkeypatch):
    honest = pruning._head_bound
    bare = pruning.NormLayer
    monkeypatch.setattr(pruning, "_head_bound", lambda norm, *a: honest(bare(norm.kind, norm.eps), *a))
    assert outcomes("PRN-HEAD", 4)[0] == "fail"


def test_amdahl_notices_operations_that_are_not_counted(monkeypatch):
    from torch.utils import flop_counter

    honest = flop_counter.FlopCounterMode.get_total_flops
    monkeypatch.setattr(flop_counter.FlopCounterMode, "get_total_flops", lambda self: honest(self) + 100)
    assert outcomes("SPD-AMDAHL") == ["fail"]


@pytest.mark.parametrize("id", ["SIM-BI", "SIM-ANGLE"])
@pytest.mark.parametrize(("lengthen", "notices"), [(1.05, 1), (0.9, 1)])
def test_similarity_notices_a_witness_of_another_length(id, lengthen, notices, monkeypatch):
    honest = similarity._steepest
    monkeypatch.setattr(similarity, "_steepest", lambda x, f, rho: lengthen * honest(x, f, rho))
    assert outcomes(id)[notices] == "fail"


def test_similarity_notices_bounds_that_are_too_small(monkeypatch):
    """Twice the influence and 1.2 times the angle: as if the bounds were that much smaller."""
    angle, cosine = similarity.angle, torch.cosine_similarity
    monkeypatch.setattr(similarity, "angle", lambda a, b: 1.2 * angle(a, b))
    monkeypatch.setattr(torch, "cosine_similarity", lambda *a, **k: 2 * cosine(*a, **k) - 1)
    assert outcomes("SIM-ANGLE") == ["fail", "fail", "fail"]
    assert outcomes("SIM-BI") == ["fail", "fail"]


@pytest.mark.parametrize("id", ["SIM-TRIANGLE", "SIM-SUM-ARC"])
def test_distances_notice_a_measure_that_is_no_metric(id, monkeypatch):
    """The squared angle breaks the triangle inequality."""
    honest = similarity.angle
    monkeypatch.setattr(similarity, "angle", lambda a, b: honest(a, b) ** 2)
    assert outcomes(id)[0] == "fail"


def test_arcs_past_the_half_must_differ(monkeypatch):
    honest = similarity._places
    monkeypatch.setattr(
        similarity,
        "_places",
        lambda low, high, n: honest(low, min(high, 1.0) if low > 1 else high, n),
    )
    assert outcomes("SIM-SUM-ARC") == ["pass", "fail"]


def test_global_cosine_notices_other_weights_and_instances(monkeypatch):
    honest = similarity._far_apart
    monkeypatch.setattr(similarity, "_far_apart", lambda delta, n: honest(0.999 * delta, n))
    assert outcomes("SIM-GLOBAL") == ["pass", "pass", "fail", "pass"]
    norm = torch.Tensor.norm
    monkeypatch.setattr(torch.Tensor, "norm", lambda self, **k: norm(self, p=1.5, **k))
    assert outcomes("SIM-GLOBAL")[:2] == ["fail", "fail"]
    monkeypatch.setattr(
        torch, "cosine_similarity", lambda x, *a, **k: 2.5 + 0 * x.sum(-1) if x.ndim > 2 else 0 * x.sum(-1)
    )
    assert outcomes("SIM-GLOBAL")[3] == "fail"
