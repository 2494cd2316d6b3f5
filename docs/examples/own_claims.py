"""Two bounds on RMSNorm's Jacobian with a gain: one true, one false."""

import sympy as sp

from preln.testing import NormLayer, assert_sigma_bound, check_property, eps_values, gains, norm_inputs
from preln.theory import claim, settle

sigma, s, top, rest, length = sp.symbols("sigma s top rest length", nonnegative=True)


def on_numbers(bound):
    """Compare the bound, times 1/s, with the dense sigma of autograd's Jacobian."""

    def check(gain, x, eps):
        layer = NormLayer("rms_norm", eps, gain)
        assert_sigma_bound(layer, x, bound(gain) / layer.denominator(x))

    return check_property(check, gains(4), norm_inputs(4), eps_values(), against="autograd of rms_norm")


@claim("MY-LENGTH", title="Length", statement="sigma(G) <= |gamma|_2/s", uses=["RMS-GAIN-BOUND"])
def length_bound():
    known = [s > 0, sigma <= top / s, sp.Eq(length**2, top**2 + rest**2)]
    return [settle(sigma <= length / s, known), on_numbers(lambda gain: gain.norm())]


@claim("MY-MEAN", title="Mean", statement="sigma(G) <= mean |gamma|/s", uses=["RMS-GAIN-BOUND"])
def mean_bound():
    return [on_numbers(lambda gain: gain.abs().mean())]
