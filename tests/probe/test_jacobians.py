from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from preln.base.errors import InputError
from preln.linops import dense_matrix, extreme_singular_values, jacobian_operator
from preln.models import ARCHITECTURES, anatomy, tiny_model
from preln.models.maps import block_map, capture_calls, hidden_input
from preln.models.residual import as_tokens, forward_losses, on_blocks, undisturbed
from preln.probe.jacobians import jacobian_tables
from preln.probe.measures import JACOBIAN

pytestmark = pytest.mark.integration
ALL = set(JACOBIAN)
EXACT = {"rtol": 1e-7, "max_products": 400, "draws": 0}


def ids(n=2, t=4, seed=0):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(seed))


def tables(model, batch, wanted=ALL, mask=None, **options):
    with undisturbed(model):
        found = anatomy(model)
    return jacobian_tables(model, found, as_tokens(batch, mask), set(wanted), **{"draws": 0} | options)


def keyed(frame, sequence=None):
    if sequence is not None:
        frame = frame[frame["sequence"] == sequence]
    return frame.set_index(["measure", "layer", "site"])["value"].to_dict()


# by hand, not found: blocks, norm and branch of either half, and whether the halves are side by side
NAMES = {
    "llama": ("model.layers", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp", False),
    "qwen3": ("model.layers", "input_layernorm", "self_attn", "post_attention_layernorm", "mlp", False),
    "gpt2": ("transformer.h", "ln_1", "attn", "ln_2", "mlp", False),
    "gpt_neox": (
        "gpt_neox.layers", "input_layernorm", "attention", "post_attention_layernorm", "mlp", True,
    ),
}  # fmt: skip


def dense(function, x):
    return torch.autograd.functional.jacobian(function, x).reshape(x.numel(), x.numel()).double()


def sigma(matrix):
    return torch.linalg.matrix_norm(matrix, 2).item()


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def definition(model, architecture, batch):
    """Every measure of one sequence from dense Jacobians: modules called directly, nothing replaced."""
    path, norm1, attention, norm2, mlp, parallel = NAMES[architecture]
    expected, stack, table = {}, None, {}
    blocks = list(model.get_submodule(path))
    taken: dict = {}

    def keep(module, args, kwargs):
        taken.setdefault(module, (args[0] if args else kwargs["hidden_states"], args[1:], kwargs))

    handles = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for block in blocks
        for module in (block, *(block.get_submodule(n) for n in (norm1, attention, norm2, mlp)))
    ]
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()

    def jacobian(module):
        x, args, kwargs = taken[module]
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}

        def call(z):
            named = not args and "hidden_states" in kwargs
            return first(module(hidden_states=z, **rest) if named else module(z, *args, **rest))

        return dense(call, x.detach())

    for layer in reversed(range(len(blocks))):
        block = blocks[layer]
        j = jacobian(block)
        a1, g1, a2, g2 = (jacobian(block.get_submodule(n)) for n in (attention, norm1, mlp, norm2))
        eye = torch.eye(len(j)).double()
        together = eye + a1 @ g1 + a2 @ g2 if parallel else (eye + a2 @ g2) @ (eye + a1 @ g1)
        assert sigma(j - together) < 1e-5 * sigma(j)
        s = [sigma(m) for m in (a1, g1, a2, g2)]
        m1, m2 = s[0] * s[1], s[2] * s[3]
        upper = 1 + m1 + m2 if parallel else (1 + m1) * (1 + m2)
        stack = j if stack is None else stack @ j
        table[layer] = (upper, sigma(j))
        singular = torch.linalg.svdvals(j)
        expected |= {
            ("branch_sigma", layer, "attention"): s[0],
            ("branch_sigma", layer, "mlp"): s[2],
            ("update_sigma", layer, "attention"): sigma(a1 @ g1),
            ("update_sigma_bound", layer, "attention"): m1,
            ("update_sigma", layer, "mlp"): sigma(a2 @ g2),
            ("update_sigma_bound", layer, "mlp"): m2,
            ("update_sigma", layer, "block"): sigma(j - eye),
            ("update_sigma_bound", layer, "block"): upper - 1,
            ("block_sigma", layer, "block"): singular[0].item(),
            ("block_sigma_bound", layer, "block"): upper,
            ("block_sigma_min", layer, "block"): singular[-1].item(),
            ("block_sigma_min_bound", layer, "block"): max(
                (max(0, 1 - m1 - m2) if parallel else max(0, 1 - m1) * max(0, 1 - m2)),
                1 - sigma(j - eye),
            ),
            ("stack_sigma", layer, "block"): sigma(stack),
            ("stack_sigma_bound", layer, "block"): np.prod([table[k][0] for k in table]),
            ("stack_sigma_product", layer, "block"): np.prod([table[k][1] for k in table]),
        }
    return expected


def soften(model, factor):
    """Scale the branches' last maps, so that a g < 1 and lower bounds say something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("o_proj", "down_proj", "c_proj", "attention.dense", "4h_to_h")):
                parameter.mul_(factor)
    return model


@pytest.mark.parametrize("architecture", sorted(NAMES))
@pytest.mark.parametrize("factor", [1.0, 0.02])
def test_every_measure_equals_the_dense_decomposition(architecture, factor):
    model = tiny_model(architecture, blocks=2, attn_implementation="eager").double()
    soften(model, factor)
    batch = ids(2, 3)
    _, sequences = tables(model, batch, batch_size=2, **EXACT)
    for row in range(2):
        expected, found = definition(model, architecture, batch[row : row + 1]), keyed(sequences, row)
        for key, value in expected.items():
            # a smallest Ritz value is only the smallest seen so far
            if key[0] == "block_sigma_min":
                rounding = 1e-6 * expected["block_sigma", key[1], "block"]
                assert found[key] >= value - rounding, key
                continue
            assert found[key] == pytest.approx(value, rel=2e-5, abs=1e-6), key
        if factor < 1:
            assert found["block_sigma_min_bound", 1, "block"] > 0.1
        for layer in range(2):
            bound = found["block_sigma_min_bound", layer, "block"]
            assert bound <= expected["block_sigma_min", layer, "block"] * (1 + 1e-6)


def test_the_smallest_singular_value_is_found_when_the_iteration_goes_on():
    model, batch = tiny_model("gpt2", blocks=1).double(), ids(1, 3)
    key = ("block_sigma_min", 0, "block")
    least = definition(model, "gpt2", batch)[key]
    with undisturbed(model):
        found = anatomy(model)
        (call,) = capture_calls(model, found, as_tokens(batch))
        op = jacobian_operator(block_map(found.blocks[0], call), hidden_input(call), batch=1)
        _, bottom = extreme_singular_values(op, rtol=1e-4, max_products=200, both=True)
    assert bottom.converged and bottom.sigma.item() == pytest.approx(least, rel=1e-3)
    # negative control: where only the largest was waited for, the value is far off, and its residual says so
    early = keyed(tables(model, batch, {"block_sigma_min"}, bounds=False)[0])
    assert early[key] > 1.05 * least and early["block_sigma_min_residual", 0, "block"] > 1e-2


def test_scipy_finds_the_same_value():
    model, batch = tiny_model("gpt2", blocks=2).double(), ids(1, 4)
    with undisturbed(model):
        found = anatomy(model)
        calls = capture_calls(model, found, as_tokens(batch))
        op = jacobian_operator(block_map(found.blocks[1], calls[1]), hidden_input(calls[1]), batch=1)

        def numpy_product(product):
            return lambda v: product(torch.from_numpy(np.asarray(v).reshape(1, 4, 64))).reshape(-1).numpy()

        svds = scipy.sparse.linalg.svds(
            scipy.sparse.linalg.LinearOperator(
                op.shape, matvec=numpy_product(op.matvec), rmatvec=numpy_product(op.rmatvec), dtype=np.float64
            ),
            k=1,
            return_singular_vectors=False,
        )
        matrix = dense_matrix(op)[0].reshape(4, 64, 4, 64)
    value = keyed(tables(model, batch, {"block_sigma"}, **EXACT)[0])["block_sigma", 1, "block"]
    assert value == pytest.approx(svds[0], rel=1e-6)
    # negative control: tokens by themselves, without what attention carries across
    alone = max(sigma(matrix[t, :, t]) for t in range(4))
    assert abs(alone - value) > 1e-2 * value


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_stays_under_its_bounds(architecture):
    model = tiny_model(architecture, blocks=2)
    layers, sequences = tables(model, ids(), batch_size=2, rtol=1e-4, max_products=256)
    values = keyed(layers)
    assert np.isfinite(layers["value"]).all() and (layers["n"] == 2).all()
    tight = sequences[sequences["measure"].str.endswith("_tightness")]
    assert (tight["value"] <= 1 + 1e-5).all() and (tight["value"] >= 0).all()
    residuals = layers[layers["measure"].str.fullmatch(r"\w+_sigma_residual")]
    assert (residuals["value"] <= 1e-4).all()
    for layer in range(2):
        assert values["stack_sigma", layer, "block"] <= values["stack_sigma_product", layer, "block"] * 1.0001
    with undisturbed(model):
        found = anatomy(model)
    claimed = found.placement in ("pre-ln", "parallel")
    assert ("block_sigma_bound", 0, "block") in values or not claimed
    assert ("branch_sigma", 0, "attention") in values or not claimed
    assert bool(layers.attrs["left_out"]) == (("branch_sigma", 0, "mlp") not in values)


def test_negative_control_bounds_without_the_gain_are_violated():
    """g of the norm without its gain is no bound: the exact one has to be taken with it."""
    model = tiny_model("llama", blocks=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(30.0)
    values = keyed(tables(model, ids(), {"branch_sigma", "update_sigma"}, rtol=1e-4)[0])
    right = values["update_sigma_bound", 0, "attention"]
    assert values["update_sigma", 0, "attention"] <= right * (1 + 1e-5)
    gain = model.model.layers[0].input_layernorm.weight.abs().min().item()
    assert gain > 1 and values["update_sigma", 0, "attention"] > right / gain


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_scaled_by_no_more_than_the_stack(architecture):
    model, batch = tiny_model(architecture, blocks=3), ids(3, 6)
    _, sequences = tables(model, batch, {"stack_sigma"}, rtol=1e-3)
    for row in range(3):
        states, found = {}, keyed(sequences, row)
        with undisturbed(model):
            blocks = anatomy(model).blocks
            with on_blocks(
                blocks,
                lambda layer, _x, y, states=states: (y.retain_grad(), states.update({layer + 1: y})),
                leaf=lambda x, states=states: states.update({0: x}),
            ):
                forward_losses(model, as_tokens(batch[row : row + 1])).sum().backward()
        norms = [states[layer].grad.norm().item() for layer in range(4)]
        for layer in range(3):
            assert norms[layer] <= found["stack_sigma", layer, "block"] * norms[3] * (1 + 1e-3)


def test_values_do_not_depend_on_what_shares_a_batch():
    model, batch = tiny_model("gpt2", blocks=2), ids(3, 5)
    one, three = tables(model, batch, batch_size=1)[1], tables(model, batch, batch_size=3)[1]
    one, three = (t.sort_values(["measure", "layer", "site", "sequence"]) for t in (one, three))
    np.testing.assert_array_equal(one["measure"], three["measure"])
    same = ~one["measure"].str.contains("residual|error").to_numpy()
    np.testing.assert_allclose(one["value"][same], three["value"][same], rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gptj"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_outside_of_every_map(architecture, side):
    model, short, long = tiny_model(architecture, blocks=2), ids(1, 4, seed=1), ids(1, 6, seed=2)
    padded, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    place = slice(2, 6) if side == "left" else slice(0, 4)
    padded[0, place], mask[0, place] = short[0], 1
    padded[1], mask[1] = long[0], 1
    options = {"rtol": 1e-6, "max_products": 300}
    _, together = tables(model, padded, mask=mask, batch_size=2, **options)
    for row, batch in enumerate((short, long)):
        alone, mine = keyed(tables(model, batch, **options)[0]), keyed(together, row)
        assert set(alone) == set(mine)
        for key, value in alone.items():
            if not any(word in key[0] for word in ("residual", "products", "error", "sigma_min")):
                assert mine[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
        # zeros of the projection are no singular values of the map
        key = ("block_sigma_min", 0, "block")
        assert mine[key] > 0.5 * alone[key] > 0


def bits(model):
    return {k: (v.dtype, v.clone()) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_half_precision_is_measured_in_float32(architecture, dtype):
    model = tiny_model(architecture, blocks=2).to(dtype)
    before, batch = bits(model), ids(2, 5)
    half = keyed(tables(model, batch)[0])
    for key, (kind, value) in before.items():
        now = model.state_dict()[key]
        assert now.dtype == kind and torch.equal(now, value), key
    full = keyed(tables(model.float(), batch)[0])
    assert set(half) == set(full)
    for key, value in full.items():
        if not any(word in key[0] for word in ("residual", "products", "error", "sigma_min")):
            # the states at which the Jacobians are taken carry half precision's rounding
            assert half[key] == pytest.approx(value, rel=0.1 if dtype == torch.bfloat16 else 0.02), key
    error = half["branch_decomposition_error", 0, "block"]
    assert error < 1e-5  # in bfloat16 itself it would be 1e-2


def test_the_same_seed_gives_the_same_bits():
    model, batch = tiny_model("llama", blocks=2), ids(3, 4)
    first_run, again = (tables(model, batch, seed=5, draws=50) for _ in range(2))
    for a, b in zip(first_run, again, strict=True):
        assert a.equals(b)
    assert not tables(model, batch, seed=6, draws=50)[1].equals(again[1])
    assert first_run[0]["low"].notna().all()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, monkeypatch):
    model, batch = tiny_model("llama", blocks=2).bfloat16(), ids()
    model.train()
    model.model.layers[1].eval()
    model.model.layers[0].requires_grad_(False)
    weight = model.lm_head.weight
    weight.grad = torch.ones_like(weight)
    before = bits(model), [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    if fails:
        monkeypatch.setattr("preln.probe.halves.largest_norm_sigma", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tables(model, batch)
    else:
        tables(model, batch)
    now = bits(model), [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    assert before[1:] == now[1:]
    assert all(now[0][k][0] == kind and torch.equal(now[0][k][1], v) for k, (kind, v) in before[0].items())
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_update_that_is_zero_gives_zeros_and_ones():
    model = soften(tiny_model("llama", blocks=2), 0.0)
    values = keyed(tables(model, ids())[0])
    for site in ("attention", "mlp", "block"):
        assert values["update_sigma", 0, site] == 0.0 == values["update_sigma_bound", 0, site]
        assert values["update_sigma_tightness", 0, site] == 1.0
        assert values["update_sigma_residual", 0, site] == 0.0
    for name in (
        "block_sigma",
        "block_sigma_bound",
        "block_sigma_min",
        "block_sigma_min_bound",
        "stack_sigma",
    ):
        assert values[name, 0, "block"] == pytest.approx(1.0, rel=1e-6), name
    assert all(np.isfinite(v) for v in values.values())


def test_a_block_that_ends_in_layer_norm_is_singular_and_finite():
    values = keyed(tables(tiny_model("opt-post", blocks=2), ids(1, 3), rtol=0.0, max_products=300)[0])
    assert values["block_sigma_min", 0, "block"] < 1e-4 * values["block_sigma", 0, "block"]
    assert all(np.isfinite(v) for v in values.values())
    # Weyl's bound may stay; Post-LN claims nothing about the smallest
    assert values.get(("block_sigma_min_bound", 0, "block"), 0.0) == 0.0


def test_only_what_was_asked_for():
    model = tiny_model("llama", blocks=2)
    names = set(tables(model, ids(), {"block_sigma"})[0]["measure"])
    suffixes = ("", "_bound", "_tightness", "_residual", "_products")
    assert names == {f"block_sigma{s}" for s in suffixes} | {"branch_decomposition_error"}
    bare = set(tables(model, ids(), {"block_sigma"}, bounds=False)[0]["measure"])
    assert bare == {"block_sigma", "block_sigma_residual", "block_sigma_products"}
    stack = set(tables(model, ids(), {"stack_sigma"})[0]["measure"])
    assert {"stack_sigma_product", "stack_sigma_log10_overestimate"} <= stack
    assert not any(name.startswith("block_sigma") for name in stack)


def test_bad_input_is_refused():
    model = tiny_model("llama", blocks=2)
    with pytest.raises(InputError, match="no measure of Jacobians"):
        tables(model, ids(), {"cosine"})
    with pytest.raises(InputError, match="max_products 0"):
        tables(model, ids(), {"block_sigma"}, max_products=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    found = anatomy(tiny_model("llama", blocks=2))
    found.blocks[:] = list(model.model.layers)  # an anatomy cannot be taken of a broken model
    with pytest.raises(InputError, match=r"block 1: .*not finite"):
        jacobian_tables(model, found, as_tokens(ids()), {"block_sigma"}, bounds=False)


@pytest.mark.parametrize(("architecture", "wrong"), [("llama", "parallel"), ("gpt_neox", "pre-ln")])
def test_a_placement_that_does_not_explain_the_block_brings_no_bounds(architecture, wrong):
    model = tiny_model(architecture, blocks=2)
    found = anatomy(model)
    found.placement, found.placements = wrong, [wrong, wrong]
    layers, _ = jacobian_tables(model, found, as_tokens(ids()), set(JACOBIAN), draws=0)
    assert len(layers.attrs["left_out"]) == 2 and layers.attrs["left_out"][0].startswith("block 0: ")
    values = keyed(layers)
    assert {"block_sigma", "update_sigma", "stack_sigma", "stack_sigma_product"} <= set(layers["measure"])
    assert not any(name.startswith("branch_") for name, _, _ in values)
    assert not {"block_sigma_bound", "stack_sigma_bound"} & set(layers["measure"])
    assert all(site == "block" for name, _, site in values if name.startswith("update_"))
    # what needs no claim about the placement stays: Weyl's bound
    assert ("block_sigma_min_bound", 0, "block") in values


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "opt-post"])
def test_norms_behind_branches_bring_the_claims_of_their_placement(architecture):
    values = keyed(tables(tiny_model(architecture, blocks=2), ids(), rtol=1e-5, max_products=256)[0])
    a = [values["branch_sigma", 1, site] for site in ("attention", "mlp")]
    bound = values["block_sigma_bound", 1, "block"]
    assert values["block_sigma", 1, "block"] <= bound * (1 + 1e-5)
    halves = ("update_sigma_bound", 1, "attention"), ("update_sigma_bound", 1, "mlp")
    if architecture == "opt-post":
        assert not {*halves, ("update_sigma", 1, "attention")} & set(values)
        assert bound > 0 and ("update_sigma_bound", 1, "block") not in values
        return
    m1, m2 = (values[key] for key in halves)
    # one sequence's bounds multiply, means over sequences only nearly
    assert bound == pytest.approx((1 + m1) * (1 + m2), rel=0.05)
    assert all(m != pytest.approx(x, rel=1e-2) for m, x in zip((m1, m2), a, strict=True))
