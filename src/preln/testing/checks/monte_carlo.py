"""Random networks against what theory says of their means, with intervals (STK-INIT, STK-GROWTH).

STK-INIT takes its set-up from Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020:
one attention head whose query matrix is 0 at initialisation, so that it averages over the tokens; value
matrix and both matrices of the feed-forward half d x d with independent N(0, 1/d) entries; ReLU; LayerNorm.

What makes its gradients exact for finite d: the gradient of <c, LayerNorm(x)> is P c/s, with P a projector of
rank d - 2 and s^2 = var(x). For a random direction c, independent of x, the mean of |c|^2/|P c|^2 is
(d - 2)/(d - 4). So it is the mean of the inverse square of the gradient that theory knows, and the figures
show its inverse root.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from preln.testing.checks.measurement import Measured, Panel, Theory, curve, measurement
from preln.testing.layers import NormLayer, dense_sigma
from preln.theory import Evidence

WIDTH, TOKENS, SEED = 128, 16, 7
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24)
BATCH = 32

GROWTH_WIDTH, START = 48, 4
GROWTH_DEPTHS = (5, 6, 8, 12, 16, 24, 32, 48, 64)
SIZE, ALIGNED, ORIGIN = 1.0, 0.5, 1.0
"""sigma(A) = a; the aligned branches' step m; rms(x_0)."""


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    """Apply one matrix a network, `[n, d, d]`, to `[n, T, d]`."""
    return x @ weight.mT


def _norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=0.0)


def _mean_square(x: Tensor) -> Tensor:
    """Return |x|^2/d, averaged over tokens: `[n]`."""
    return x.square().mean((-2, -1))


def _inverse_square_of_weight_gradient(x: Tensor, hidden: Tensor, weight: Tensor, c: Tensor) -> Tensor:
    """Return (|c||h|/|dL/dW|)^2 for L = <c, LayerNorm(x + W h)>, one token, by autograd: `[n]`."""
    weight = weight.detach().requires_grad_()
    loss = (c * _norm(x + _apply(weight, hidden))).sum()
    gradient = torch.autograd.grad(loss, weight)[0]
    return (_length(c) * _length(hidden) / _length(gradient)).square()


def _inverse_square_of_hidden_gradient(x: Tensor, c: Tensor) -> Tensor:
    """Return (|c|/|dL/dx|)^2 for L = <c, LayerNorm(x)> token by token, averaged: `[n]`."""
    x = x.detach().requires_grad_()
    gradient = torch.autograd.grad((c * _norm(x)).sum(), x)[0]
    return (c.square().sum(-1) / gradient.square().sum(-1)).mean(-1)


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=-1)


def initial_networks(networks: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Run fresh Pre-LN and Post-LN stacks; return statistics by name, `[networks, depths]`."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(networks, *shape, generator=generator)

    one, many, post = draw(1, WIDTH), draw(TOKENS, WIDTH), draw(1, WIDTH)
    found: dict[str, list[Tensor]] = {}
    for depth in range(1, max(DEPTHS) + 1):
        value, first, second = (draw(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(3))

        def hidden(y: Tensor, first: Tensor = first) -> Tensor:
            return _apply(first, y).relu()

        one = one + _apply(value, _norm(one))
        many = many + _apply(value, _norm(many).mean(1, keepdim=True))
        post = _norm(post + _apply(value, post))
        before = {"pre": (one, hidden(_norm(one))), "post": (post, hidden(post))}
        one = one + _apply(second, before["pre"][1])
        many = many + _apply(second, hidden(_norm(many)))
        last = post + _apply(second, before["post"][1])
        post = _norm(last)
        if depth in DEPTHS:
            new = {"one": _mean_square(one), "many": _mean_square(many), "last": _mean_square(last)}
            for name, (x, h) in before.items():
                new[f"{name} gradient"] = _inverse_square_of_weight_gradient(x, h, second, draw(1, WIDTH))
            new["many gradient"] = _inverse_square_of_hidden_gradient(many, draw(TOKENS, WIDTH))
            for name, value in new.items():
                found.setdefault(name, []).append(value.double())
    return {name: torch.stack(values, -1) for name, values in found.items()}


def stk_init(rounds: int) -> list[Evidence]:
    """Measure |x_l|^2 and gradients of Pre-LN and Post-LN stacks at initialisation."""
    generator = torch.Generator().manual_seed(SEED)
    batches = [initial_networks(BATCH, generator) for _ in range(2 + rounds // 2)]
    samples = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    depth = torch.tensor(DEPTHS, dtype=torch.float64)
    low, high = 1 + depth / 2, 1 + 3 * depth / 2
    three_halves = torch.full_like(depth, 1.5)
    sizes = Panel(
        "Residual stream at initialisation",
        "depth l",
        "mean |x[l]|²/d",
        [
            Measured("Pre-LN, 1 token", DEPTHS, samples["one"], curve("1 + 3l/2", high)),
            Measured(
                f"Pre-LN, {TOKENS} tokens", DEPTHS, samples["many"], Theory("1 + l/2 to 1 + 3l/2", low, high)
            ),
            Measured("Post-LN, last norm's input", DEPTHS, samples["last"], curve("3/2", three_halves)),
        ],
    )
    # var(x) is |x|^2/d less the square of the mean: the share (d - 1)/d of all but Post-LN's normed input.
    share = (WIDTH - 1) / WIDTH
    direction = (WIDTH - 2) / (WIDTH - 4)

    def root(inverse_square: Tensor) -> Tensor:
        return (inverse_square / direction).rsqrt()

    band = Theory("1/s, s² = 1 + L/2 to 1 + 3L/2", (share * high).rsqrt(), (share * low).rsqrt())
    after_norm = torch.full_like(depth, 1 + share / 2).rsqrt()
    gradients = Panel(
        "Gradient behind the final norm",
        "depth L",
        "gradient per unit |c||h|, |c|",
        [
            Measured(
                "Pre-LN, last W₂, 1 token",
                DEPTHS,
                samples["pre gradient"],
                curve("1/s, s² = 1 + 3L/2", (share * high).rsqrt()),
                root,
            ),
            Measured(f"Pre-LN, x[L], {TOKENS} tokens", DEPTHS, samples["many gradient"], band, root),
            Measured(
                "Post-LN, last W₂, 1 token",
                DEPTHS,
                samples["post gradient"],
                curve("1/s, s² = 3/2", after_norm),
                root,
            ),
        ],
        "log",
    )
    model = f"Pre-LN and Post-LN stacks at initialisation, d = {WIDTH}, one head, ReLU, float32"
    data = f"x_0 with independent N(0, 1) entries, 1 and {TOKENS} tokens"
    return [measurement([sizes, gradients], model=model, data=data, seed=SEED)]


Walk = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x_k -> A_k as `[n, d, d]`, and what the branch adds"""


def _rotations(networks: int, generator: torch.Generator) -> Tensor:
    """Return random rotations by Haar's measure: QR with the signs of R's diagonal taken out."""
    shape = (networks, GROWTH_WIDTH, GROWTH_WIDTH)
    q, r = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


def growing_stack(networks: int, generator: torch.Generator, *, aligned: bool) -> dict[str, Tensor]:
    """Run x_{k+1} = x_k + A_k RMSNorm(x_k) with sigma(A_k) = a; return statistics, `[networks, depths]`.

    Uncorrelated: A_k is a times a random rotation, so the branch's rms is a and v = a^2. Aligned: A_k is m
    along x_0 and a across it, so every branch adds the same vector, of rms m.
    """
    d, norm = GROWTH_WIDTH, NormLayer("rms_norm", 0.0)
    eye = torch.eye(d, dtype=torch.float64)
    unit = torch.randn(networks, d, dtype=torch.float64, generator=generator)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    x = ORIGIN * d**0.5 * unit
    along = unit[:, :, None] * unit[:, None, :]
    product, log_bound = eye.expand(networks, d, d), torch.zeros(networks, dtype=x.dtype)
    found: dict[str, list[Tensor]] = {"mean square": [], "bound": [], "product": []}
    for k in range(max(GROWTH_DEPTHS)):
        a = ALIGNED * along + SIZE * (eye - along) if aligned else SIZE * _rotations(networks, generator)
        if k >= START:
            product = (eye + a @ norm.jacobian(x)) @ product
            log_bound = log_bound + (SIZE * norm.sigma(x)).log1p()
        x = x + (a @ norm(x)[..., None]).squeeze(-1)
        if k + 1 in GROWTH_DEPTHS:
            found["mean square"].append(x.square().mean(-1))
            found["bound"].append(log_bound)
            found["product"].append(dense_sigma(product).log())
    return {name: torch.stack(values, -1) for name, values in found.items()}


def _square_root_band(depth: Tensor) -> Theory:
    """Return what prod (1 + a/s_k) lies between for s_k^2 = v (k + q), q = r_0^2/v.

    The upper end is the theorem's, moved by q. The lower one takes log(1 + t) >= t - t^2/2 from it.
    """
    v, q, c = SIZE**2, ORIGIN**2 / SIZE**2, 2.0
    spread = torch.stack([(torch.arange(START, last) + q).reciprocal().sum() for last in GROWTH_DEPTHS])
    low = c * ((depth + q).sqrt() - (START + q) ** 0.5) - SIZE**2 / (2 * v) * spread
    high = c * ((depth - 1 + q).sqrt() - (START - 1 + q) ** 0.5)
    return Theory("exp(c(√L − √l)) and lower end", low.exp(), high.exp())


def _power_band(depth: Tensor) -> Theory:
    """Return what prod (1 + p/(k + q)) lies between for p >= 1, q = r_0/m."""
    p, q = SIZE / ALIGNED, ORIGIN / ALIGNED
    ends = [((depth + shift) / (START + shift)) ** p for shift in (q + p - 1, q)]
    return Theory("(L/l)^p and lower end", *ends)


def stk_growth(rounds: int) -> list[Evidence]:
    """Measure stream, bound and Jacobians of stacks with uncorrelated and with aligned branches."""
    generator = torch.Generator().manual_seed(SEED + 1)
    networks = 96 + 3 * rounds
    free = growing_stack(networks, generator, aligned=False)
    same = growing_stack(networks, generator, aligned=True)
    depth = torch.tensor(GROWTH_DEPTHS, dtype=torch.float64)
    stream = Panel(
        "Residual stream",
        "depth l",
        "rms of x[l]",
        [
            _grown("uncorrelated", free, "√(r₀² + vl)", (ORIGIN**2 + SIZE**2 * depth).sqrt()),
            _grown("aligned", same, "r₀ + ml", ORIGIN + ALIGNED * depth),
        ],
    )
    panels = [stream]
    for name, found, band in (("Uncorrelated", free, _square_root_band), ("Aligned", same, _power_band)):
        curves = [
            Measured("∏(1 + a/s[k])", GROWTH_DEPTHS, found["bound"], band(depth), torch.exp),
            Measured("σ(∏ J[k])", GROWTH_DEPTHS, found["product"], None, torch.exp),
        ]
        panels.append(Panel(f"{name}, from l = {START} to L", "depth L", "bound and σ", curves, "log"))
    broken = _above_bound("uncorrelated", free) + _above_bound("aligned", same)
    model = f"x + A RMSNorm(x), d = {GROWTH_WIDTH}, σ(A) = a = {SIZE:g}; aligned: m = {ALIGNED:g}; float64"
    data = f"x_0 in a random direction, rms(x_0) = r₀ = {ORIGIN:g}"
    return [measurement(panels, model=model, data=data, seed=SEED + 1, broken=broken)]


def _grown(name: str, found: dict[str, Tensor], formula: str, expected: Tensor) -> Measured:
    return Measured(name, GROWTH_DEPTHS, found["mean square"], curve(formula, expected), torch.sqrt)


def _above_bound(name: str, found: dict[str, Tensor]) -> list[str]:
    """Name the depths at which the product of Jacobians exceeds its bound in some network."""
    above = (found["product"] > found["bound"] + 1e-9).any(0).tolist()
    return [
        f"product above its bound, {name}, at {at}"
        for at, bad in zip(GROWTH_DEPTHS, above, strict=True)
        if bad
    ]


MEASUREMENTS: dict[str, Callable[[int], list[Evidence]]] = {"STK-INIT": stk_init, "STK-GROWTH": stk_growth}
