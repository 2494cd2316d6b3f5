"""What healing trains, what that can reach, and what it costs (HEAL-*).

Sizes are those of a decoder in Llama's layout: hidden size d, feed-forward width f, H heads and K key-value
heads of e entries each, vocabulary V, no biases.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

from preln.theory.claims import Evidence, claim
from preln.theory.evidence import Smt, Symbolic
from preln.theory.smt import Formula

R = "Reassessing Layer Pruning in LLMs"
LLAMA_31_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "num_hidden_layers": 24,
}
"""Llama-3.1-8B's published config less 8 of its 32 blocks."""
PUBLISHED = {
    "lora": "15.73",
    "head": "525.34",
    "head +1": "743.45",
    "head +2": "961.56",
    "head +3": "1179.68",
}
"""Millions of trainable parameters, as published."""


def linear_maps(config: Mapping[str, int]) -> list[tuple[int, int]]:
    """Return (outputs, inputs) of the linear maps of one block: q, k, v, o, gate, up, down."""
    d, width = config["hidden_size"], config["intermediate_size"]
    heads, shared, entries = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    attention = [(heads * entries, d), (shared * entries, d), (shared * entries, d), (d, heads * entries)]
    return [*attention, (width, d), (width, d), (d, width)]


def lora_parameters(config: Mapping[str, int], rank: int) -> int:
    """Return the parameters of rank-r adapters on every linear map of every block: L sum r (out + in)."""
    return config["num_hidden_layers"] * sum(rank * (out + into) for out, into in linear_maps(config))


def tail_parameters(config: Mapping[str, int], blocks: int) -> int:
    """Return the parameters of the final norm, an untied head and the last `blocks` blocks."""
    d = config["hidden_size"]
    block = sum(out * into for out, into in linear_maps(config)) + 2 * d
    return config["vocab_size"] * d + d + blocks * block


@claim(
    "HEAL-PARAMS",
    title="Trainable parameters of each recipe",
    statement="On Llama-3.1-8B less 8 blocks (24 left): LoRA of rank 8 on q, k, v, o, gate, up, down has "
    "15,728,640 parameters (15.73M); final norm and head 525,340,672 (525.34M); with the last block "
    "743,452,672 (743.45M), the last two 961,564,672 (961.56M), the last three 1,179,676,672 (1179.68M). In "
    "general LoRA has r L (2 d + 2 (H + K) e + 2 d + 3 (d + f)) parameters and the tail V d + d + k (2 d (H "
    "+ K) e + 3 d f + 2 d).",
    assumptions=["Llama's layout without biases", "the head is not tied to the embedding"],
    source=R,
)
def heal_params() -> list[Evidence]:
    """Add up shapes symbolically; put the config's numbers in; round as published."""
    names = {k: sp.Symbol(k, positive=True, integer=True) for k in LLAMA_31_8B}
    d, f, h, s, e, v, n = names.values()
    rank, k = sp.symbols("r k", positive=True, integer=True)
    lora = rank * n * (4 * d + 2 * (h + s) * e + 3 * (d + f))
    tail = v * d + d + k * (2 * d * (h + s) * e + 3 * d * f + 2 * d)
    proof = Symbolic("sums over the shapes of the linear maps; then the config's numbers")
    proof.equal("LoRA", lora_parameters(names, rank), lora)
    proof.equal("tail", tail_parameters(names, k), tail)
    numbers = {names[key]: value for key, value in LLAMA_31_8B.items()}
    counts = {"lora": lora.subs(numbers | {rank: 8})}
    counts |= {"head" + (f" +{b}" if b else ""): tail.subs(numbers | {k: b}) for b in range(4)}
    exact = dict(
        zip(PUBLISHED, (15_728_640, 525_340_672, 743_452_672, 961_564_672, 1_179_676_672), strict=True)
    )
    for name, count in counts.items():
        proof.true(f"{name}: {count}", count == exact[name])
        proof.true(f"{name}: {PUBLISHED[name]}M", f"{int(count) / 1e6:.2f}" == PUBLISHED[name])
    proof.reject("no grouped keys (K = H)", lora_parameters(names, rank), lora.subs(s, h), mutation="other")
    proof.reject("32 blocks", counts["lora"], lora.subs(numbers | {n: 32, rank: 8}), mutation="other")
    proof.reject("norms' gains dropped", tail_parameters(names, k), tail - k * 2 * d, mutation="gain dropped")
    proof.reject("final norm's gain dropped", tail_parameters(names, k), tail - d, mutation="gain dropped")
    proof.reject("head dropped", tail_parameters(names, k), tail - v * d, mutation="term dropped")
    return [proof.evidence()]


@claim(
    "HEAL-PREFIX",
    title="Training the tail on cached outputs of a frozen prefix",
    statement="If the prefix is frozen and a function of its input alone (no dropout, no batch statistics), "
    "training the tail on cached outputs gives the same parameters and optimizer state as partial "
    "fine-tuning through the whole model, after every step, for every optimizer that sees the tail's "
    "gradients only.",
    assumptions=[
        "same initial state, batches (with labels and masks) in the same order, same random numbers in the "
        "tail",
        "the same arithmetic (kernels and dtype) on the same values",
    ],
    source="own",
)
def heal_prefix() -> list[Evidence]:
    """Uninterpreted functions: gradient, update and prefix can be anything."""
    state, cached, row, other, store, frozen = sp.symbols("state cached row other store prefix", real=True)
    prefix, gradient, update = sp.Function("Prefix"), sp.Function("Gradient"), sp.Function("Update")

    def step(at: sp.Expr, hidden: sp.Expr) -> sp.Expr:
        """Return the state after one step: the update is a function of the state and the tail's gradient."""
        return update(at, gradient(at, hidden))

    same, whole = sp.Eq(state, cached), step(state, prefix(row, frozen))
    from_store = step(cached, store)
    kept = sp.Eq(store, prefix(row, frozen))
    proof = Smt("induction over steps; functions without a definition, so any model and optimizer", [])
    proof.show("start: both runs have the same state", same, sp.Eq(state, row), sp.Eq(cached, row))
    proof.show("step", sp.Eq(whole, from_store), same, kept)
    proof.reject(
        "a prefix that changes",
        sp.Eq(step(state, prefix(row, other)), from_store),
        same,
        kept,
        mutation="assumption dropped",
    )
    noise = sp.Function("NoisyPrefix")
    random = sp.Eq(store, noise(row, frozen))
    proof.reject(
        "dropout in the prefix",
        sp.Eq(step(state, noise(row, other)), from_store),
        same,
        random,
        mutation="assumption dropped",
    )
    proof.reject(
        "batches in another order",
        sp.Eq(step(state, prefix(other, frozen)), from_store),
        same,
        kept,
        mutation="assumption dropped",
    )
    proof.reject("states that differ", sp.Eq(whole, from_store), kept, mutation="assumption dropped")
    clipped = sp.Function("Clipped")
    together = sp.Eq(
        clipped(state, gradient(state, store), other), clipped(cached, gradient(cached, store), row)
    )
    proof.reject(
        "an optimizer that sees the prefix's gradients", together, same, kept, mutation="assumption dropped"
    )
    return [proof.evidence()]


@claim(
    "HEAL-RANK",
    title="What a rank-r adapter reaches, against free tail weights",
    statement="W + B A with B of r columns reaches exactly the changes of rank at most r; the closest to a "
    "change E misses it, in the spectral norm, by sigma_{r+1}(E), attained by the truncated singular value "
    "decomposition. Free weights reach every E; the adapters form a set of dimension r (m + n - r) < m n "
    "for r < min(m, n). Neither recipe contains the other: tail training reaches changes of rank above r, "
    "gains and the head; but it cannot tell apart two inputs that the frozen prefix maps to the same "
    "states, which for some prefixes and inputs a rank-1 adapter in the prefix can.",
    assumptions=[
        "r equations in r + 1 unknowns have a solution other than 0",
        "singular value decomposition",
        "the matrices of rank r form a set of dimension r (m + n - r)",
    ],
    source="Eckart and Young 1936, Mirsky 1960; the comparison is this project's",
)
def heal_rank() -> list[Evidence]:
    """Lower bound on the top r + 1 singular directions, term by term; count dimensions; two exact maps."""
    m, n, r = sp.symbols("m n r", positive=True)
    sigma_i, last, weight, missed = sp.symbols("sigma_i sigma_last c2 missed2", nonnegative=True)
    proof = Symbolic("dimension count; an explicit prefix and adapter")
    proof.equal("m n - r (m + n - r) = (m - r)(n - r)", m * n - r * (m + n - r), (m - r) * (n - r))
    lossy, adapter = sp.diag(1, 0), sp.Matrix([0, 1]) * sp.Matrix([[0, 1]])
    one, two = sp.Matrix([0, 0]), sp.Matrix([0, 1])
    proof.true("the frozen prefix merges (0, 0) and (0, 1)", lossy * one == lossy * two)
    proof.true(
        "a rank-1 adapter separates them",
        (lossy + adapter) * one != (lossy + adapter) * two and adapter.rank() == 1,
    )
    proof.true("the identity, rank 2, is no rank-1 change", sp.eye(2).rank() > 1)
    proof.reject("dimension r (m + n)", m * n - r * (m + n), (m - r) * (n - r), mutation="term dropped")
    terms = Smt("a unit vector in the span of the top r + 1 directions that the competitor sends to 0", [])
    top: list[Formula] = [sigma_i >= last]
    terms.show(
        "each term: sigma_i^2 c_i^2 >= sigma_{r+1}^2 c_i^2", sigma_i**2 * weight >= last**2 * weight, *top
    )
    rest = sp.Symbol("c2_rest", nonnegative=True)
    whole = missed >= sigma_i**2 * weight + last**2 * rest
    terms.show("so |(E - X) v|^2 >= sigma_{r+1}^2", missed >= last**2, whole, *top, sp.Eq(weight + rest, 1))
    terms.show(
        "truncation: the terms left are at most sigma_{r+1}^2 c_i^2",
        sigma_i**2 * weight <= last**2 * weight,
        sigma_i <= last,
    )
    terms.show("(m - r)(n - r) > 0 for r < min(m, n)", (m - r) * (n - r) > 0, r < m, r < n)
    tail = sp.Function("Tail")
    left, right = sp.symbols("h1 h2", real=True)
    terms.show("no tail separates equal states", sp.Eq(tail(left), tail(right)), sp.Eq(left, right))
    terms.reject(
        "it misses by sigma_r at least",
        missed >= sigma_i**2,
        missed >= last**2 * weight,
        sp.Eq(weight, 1),
        *top,
        mutation="bound tightened",
    )
    terms.reject(
        "every tail merges different states", sp.Eq(tail(left), tail(right)), mutation="assumption dropped"
    )
    terms.reject(
        "full rank leaves room", (m - r) * (n - r) > 0, r <= m, r <= n, mutation="assumption dropped"
    )
    terms.reject(
        "it misses by at most sigma_{r+1}",
        missed <= last**2,
        missed >= last**2 * weight,
        sp.Eq(weight, 1),
        mutation="inequality turned",
    )
    return [proof.evidence(), terms.evidence()]
