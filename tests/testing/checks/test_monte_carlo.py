"""Random networks agree with theory at every depth; theory that is wrong, and other networks, disagree."""

import json

import pytest
import torch
from scipy import stats

from preln.testing.checks import monte_carlo
from preln.testing.checks.measurement import LEVEL, Measured, Panel, Theory, curve, interval, measurement
from preln.testing.checks.monte_carlo import MEASUREMENTS

DEPTHS = (1, 2, 4)


@pytest.fixture
def small(monkeypatch):
    """Fewer depths: the same networks, cut off."""
    monkeypatch.setattr(monte_carlo, "DEPTHS", (1, 2, 4, 8))
    monkeypatch.setattr(monte_carlo, "GROWTH_DEPTHS", (5, 6, 8, 12))


@pytest.mark.parametrize("id", MEASUREMENTS)
def test_theory_holds_at_every_depth(id):
    (found,) = MEASUREMENTS[id](2)
    detail = found.detail
    assert found.kind == "measurement" and found.passed and detail["outside"] == []
    assert detail["comparisons"] >= 30 and detail["n"] >= 16 and detail["interval"] == LEVEL
    assert json.loads(json.dumps(detail)) == detail
    for panel in detail["panels"]:
        for m in panel["measured"]:
            assert len(m["x"]) == len(m["mean"]) == len(m["low"]) == len(m["high"])
            assert all(lo <= y <= hi for lo, y, hi in zip(m["low"], m["mean"], m["high"], strict=True))
        for t in panel["theory"]:
            assert all(len(t[k]) == len(t["x"]) for k in t if k not in ("name", "of", "x"))


def test_pre_norm_gradients_fall_like_the_root_of_depth_and_post_norm_ones_do_not():
    (found,) = MEASUREMENTS["STK-INIT"](2)
    pre, _, post = found.detail["panels"][1]["measured"]
    deep = monte_carlo.DEPTHS[-1]
    fell = pre["mean"][-1] / pre["mean"][0]
    assert abs(fell / ((1 + 1.5) / (1 + 1.5 * deep)) ** 0.5 - 1) < 0.1
    assert abs(post["mean"][-1] / post["mean"][0] - 1) < 0.1


def test_the_same_seed_gives_the_same_numbers(small):
    first, second = (MEASUREMENTS["STK-INIT"](0)[0].detail for _ in range(2))
    assert first == second


@pytest.mark.usefixtures("small")
class TestInitialisationNotices:
    """Negative controls: another network, the same theory."""

    def misses(self):
        (found,) = MEASUREMENTS["STK-INIT"](2)
        assert found.passed == (not found.detail["outside"])
        return " ".join(found.detail["outside"])

    def test_a_missing_relu(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "relu", lambda x: x)
        assert all(
            name in self.misses() for name in ("Pre-LN, 1 token", "Post-LN, last norm", "Post-LN, last W")
        )

    def test_weights_of_another_variance(self, monkeypatch):
        honest = monte_carlo._apply
        monkeypatch.setattr(monte_carlo, "_apply", lambda w, x: honest(1.1 * w, x))
        assert "Pre-LN, 1 token" in self.misses() and "Post-LN, last W" in self.misses()

    def test_a_forgotten_norm(self, monkeypatch):
        monkeypatch.setattr(monte_carlo, "_norm", lambda x: x)
        assert "1 + l/2 to 1 + 3l/2" in self.misses() and "1/s, s²" in self.misses()

    def test_the_wrong_number_of_lost_directions(self, monkeypatch):
        honest = monte_carlo._inverse_square_of_weight_gradient
        monkeypatch.setattr(
            monte_carlo, "_inverse_square_of_weight_gradient", lambda *a: honest(*a) * (1 - 20 / 128)
        )
        assert "last W" in self.misses()


@pytest.mark.usefixtures("small")
class TestGrowthNotices:
    def misses(self):
        (found,) = MEASUREMENTS["STK-GROWTH"](2)
        assert found.passed == (not found.detail["outside"])
        return " ".join(found.detail["outside"])

    def test_correlated_branches(self, monkeypatch):
        eye = torch.eye(monte_carlo.GROWTH_WIDTH, dtype=torch.float64)
        monkeypatch.setattr(monte_carlo, "_rotations", lambda n, generator: eye.expand(n, *eye.shape))
        misses = self.misses()
        assert "uncorrelated against √(r₀² + vl)" in misses and "exp(c" in misses
        assert "aligned" not in misses.replace("uncorrelated", "")

    def test_a_wrong_step_or_start(self, monkeypatch):
        honest = monte_carlo._grown
        monkeypatch.setattr(
            monte_carlo, "_grown", lambda n, f, w, e: honest(n, f, w, e + 0.2 * monte_carlo.SIZE)
        )
        assert "aligned against r₀ + ml" in self.misses()

    def test_a_bound_that_is_too_small(self, monkeypatch):
        honest = monte_carlo.NormLayer.sigma
        monkeypatch.setattr(monte_carlo.NormLayer, "sigma", lambda self, x: 0.5 * honest(self, x))
        misses = self.misses()
        assert "product above its bound, uncorrelated" in misses and "(L/l)^p" in misses

    def test_a_power_that_is_off(self, monkeypatch):
        honest = monte_carlo._power_band
        monkeypatch.setattr(
            monte_carlo,
            "_power_band",
            lambda depth: Theory("power", honest(depth).low ** 2, honest(depth).high ** 2),
        )
        assert "power" in self.misses()


def _panel(*measured):
    return Panel("t", "x", "y", measured)


def test_intervals_are_students():
    samples = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, low, high = interval(samples, 5)
    expected = stats.t.interval(1 - 0.01 / 5, 11, loc=samples.mean(0), scale=stats.sem(samples, axis=0))
    assert torch.allclose(torch.stack([low, high]), torch.stack([torch.as_tensor(e) for e in expected]))
    assert torch.equal(mean, samples.mean(0))


def test_curves_must_lie_in_intervals_and_intervals_in_bands():
    samples = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).double().repeat(50, 1)
    half = torch.tensor([0.5, 0.5, 0.5]).double()
    inside = measurement(
        [_panel(Measured("m", DEPTHS, samples, curve("c", half)))], model="", data="", seed=0
    )
    outside = measurement(
        [_panel(Measured("m", DEPTHS, samples, curve("c", 1.5 * half)))], model="", data="", seed=0
    )
    assert inside.passed and not outside.passed
    assert outside.detail["outside"] == ["m against c at 1", "m against c at 2", "m against c at 4"]
    for low, high, passes in ((0.2, 0.8, True), (0.45, 0.8, False), (0.2, 0.55, False)):
        band = Theory("b", torch.full((3,), low).double(), torch.full((3,), high).double())
        found = measurement([_panel(Measured("m", DEPTHS, samples, band))], model="", data="", seed=0)
        assert found.passed == passes


def test_nothing_compared_is_no_pass_and_what_broke_is_a_failure():
    samples = torch.ones(4, 3).double()
    alone = measurement([_panel(Measured("m", DEPTHS, samples))], model="", data="", seed=0)
    assert not alone.passed and alone.detail["comparisons"] == 0
    kept = [_panel(Measured("m", DEPTHS, samples, curve("1", samples[0])))]
    assert measurement(kept, model="", data="", seed=0).passed
    assert not measurement(kept, model="", data="", seed=0, broken=["x"]).passed


def test_what_is_drawn_may_turn_the_interval_around():
    samples = torch.rand(30, 3, generator=torch.Generator().manual_seed(1)).double() + 1
    drawn = Measured("m", DEPTHS, samples, curve("c", samples.mean(0).rsqrt()), torch.rsqrt)
    found = measurement([_panel(drawn)], model="", data="", seed=0)
    m = found.detail["panels"][0]["measured"][0]
    assert found.passed and all(lo < y < hi for lo, y, hi in zip(m["low"], m["mean"], m["high"], strict=True))
