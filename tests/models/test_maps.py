from __future__ import annotations

import pytest
import torch
from torch import nn

from preln.base.errors import InputError
from preln.linops import compose, dense_matrix, jacobian_operator
from preln.models import ARCHITECTURES, anatomy, tiny_model
from preln.models.interventions import BranchError, branch_map, branches_of, record
from preln.models.maps import block_map, capture_calls, check_differentiable, hidden_input, placement_of
from preln.models.precision import check_plain_weights, widen, widened
from preln.models.residual import Tokens, as_tokens, on_blocks, undisturbed

pytestmark = pytest.mark.integration


def tokens(n=2, t=4, seed=0) -> Tokens:
    return as_tokens(torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(seed)))


def operators(model, found, index, batch):
    """J of a block, and for each branch its site, A, and the norms around it."""
    call = capture_calls(model, found, batch)[index]
    block, hidden = found.blocks[index], hidden_input(call)
    jacobian = jacobian_operator(block_map(block, call), hidden, batch=1)
    parts, placement = found.parts(index), placement_of(found, index)
    branches, result = branches_of(block, parts, placement), []
    seen = record(block, call, [m for b in branches for m in (b.begin, b.held, *b.norms) if m is not None])
    for branch in branches:
        run, point = branch_map(block, call, branch, seen)
        norms = [
            norm and jacobian_operator(norm, seen.trace.inputs[norm].view(point.shape), batch=1)
            for norm in (branch.before, branch.after)
        ]
        result.append((branch.site, jacobian_operator(run, point, batch=1), *norms))
    return jacobian, result


def composed(placement, parts, v):
    """J v from the formula of the placement, written out once more."""
    if placement == "parallel":
        return v + sum(a.matvec(g.matvec(v)) for site, a, g, _ in parts if site != "block")
    for _, a, before, after in parts:
        if placement == "post-ln":
            v = after.matvec(v + a.matvec(v))
            continue
        u = a.matvec(v if before is None else before.matvec(v))
        v = v + (u if after is None else after.matvec(u))
    return v


def relative(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_branches_and_norms_make_up_the_block(architecture):
    model = tiny_model(architecture, blocks=2)
    if "num_experts_per_tok" not in ARCHITECTURES[architecture]:  # no grouped products in float64
        model = model.double()
    dtype = next(model.parameters()).dtype
    with undisturbed(model):
        found = anatomy(model)
        placement = placement_of(found, 1)
        try:
            jacobian, parts = operators(model, found, 1, tokens())
        except BranchError:
            assert placement == "post-ln"  # a module that holds branch, residual and norm in one
            return
        if placement in ("pre-ln", "parallel"):
            assert parts
        if not parts:
            return
        v = torch.randn(2, 4, 64, dtype=dtype, generator=torch.Generator().manual_seed(1))
        assert relative(composed(placement, parts, v), jacobian.matvec(v)) < 1e-5
        u = torch.randn_like(v)
        for _, a, _, _ in parts:
            torch.testing.assert_close(
                (u * a.matvec(v)).sum(), (a.rmatvec(u) * v).sum(), rtol=1e-4, atol=1e-3
            )
        joint = [(a, g) for site, a, g, _ in parts if site == "block"]
        for a, g in joint:
            assert relative(v + compose(a, g).matvec(v), jacobian.matvec(v)) < 1e-5
        # negative control: the other arrangement of the same parts is another matrix
        other = "pre-ln" if placement == "parallel" else "parallel"
        plain = [(site, a, g or after, None) for site, a, g, after in parts if site != "block"]
        assert relative(composed(other, plain, v), jacobian.matvec(v)) > 1e-3


def test_a_block_that_folds_its_tokens_keeps_its_sequences_apart():
    """OPT's MLP sees ``[b t, d]``: the map still is one on every sequence."""
    model = tiny_model("opt", blocks=2).double()
    with undisturbed(model):
        found = anatomy(model)
        both = operators(model, found, 0, tokens(2))[1]
        for row in range(2):
            batch = tokens(2)
            alone = operators(model, found, 0, as_tokens(batch.ids[row : row + 1]))[1]
            for (site, a, _, _), (_, single, _, _) in zip(both, alone, strict=True):
                torch.testing.assert_close(dense_matrix(a)[row], dense_matrix(single)[0], msg=site)


def test_replay_gives_the_states_of_the_model():
    model, batch = tiny_model("gpt2", blocks=3), tokens()
    states = []
    with undisturbed(model), torch.no_grad():
        found = anatomy(model)
        calls = capture_calls(model, found, batch, check_stream=True)
        with on_blocks(found.blocks, lambda _l, x, y: states.append((x.clone(), y.clone()))):
            model(input_ids=batch.ids)
        for block, call, (x, y) in zip(found.blocks, calls, states, strict=True):
            torch.testing.assert_close(hidden_input(call), x)
            torch.testing.assert_close(block_map(block, call)(x), y)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_a_branch_fails():
    model, batch = tiny_model("llama", blocks=2), tokens()
    with undisturbed(model):
        found = anatomy(model)
        call = capture_calls(model, found, batch)[0]
        block = found.blocks[0]
        branch = branches_of(block, found.parts(0), "pre-ln")[0]
        run, point = branch_map(block, call, branch, record(block, call, [branch.begin]))
        with pytest.raises(RuntimeError):
            run(point[..., :-1])
        with pytest.raises(BranchError, match="does not begin"):
            branch_map(block, call, branch, record(block, call, []))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_block_that_runs_twice_or_never_is_refused():
    model = tiny_model("llama", blocks=2)
    found = anatomy(model)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(InputError, match="block 0: runs more than once"):
        capture_calls(model, found, tokens())
    model.model.layers = model.model.layers[:0]
    with pytest.raises(InputError, match="block 0: did not run"):
        capture_calls(model, found, tokens())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_undone_to_the_bit(dtype):
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(dtype)
    block[1].weight.data = block[1].weight.data.float()  # a norm in float32 among half-precision weights
    before = {k: (v.clone(), v.dtype, v.data_ptr()) for k, v in block.state_dict(keep_vars=True).items()}
    with pytest.raises(RuntimeError, match="inside"), widened([block]):
        assert {p.dtype for p in block.parameters()} == {torch.float32}
        assert block[1].running_mean.dtype == torch.float32
        raise RuntimeError("inside")
    for key, value in block.state_dict(keep_vars=True).items():
        old, kind, place = before[key]
        assert (value.dtype, value.data_ptr()) == (kind, place) and torch.equal(value, old)


def test_widened_arguments_keep_their_shape_and_masks_stay_shut():
    low = torch.finfo(torch.bfloat16).min
    mask = torch.tensor([0.0, low], dtype=torch.bfloat16)
    nest = {"m": mask, "pair": (mask, [None, torch.arange(2)]), "f": torch.ones(1, dtype=torch.float64)}
    wide = widen(nest)
    assert wide["m"].tolist() == [0.0, torch.finfo(torch.float32).min]
    assert wide["pair"][0].dtype == torch.float32 and wide["pair"][1][1] is nest["pair"][1][1]
    assert wide["f"] is nest["f"]
    # float16's lowest number is no mask in float32: a score of 1e5 outweighs it
    shut = widen(torch.tensor([0.0, torch.finfo(torch.float16).min], dtype=torch.float16))
    assert torch.softmax(shut + torch.tensor([0.0, 1e5]), dim=0).tolist() == [1.0, 0.0]


def test_what_has_no_second_derivative_is_refused():
    model = tiny_model("llama", blocks=2)
    found = anatomy(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(InputError, match="eager"):
        check_differentiable(model, found)
    model.config._attn_implementation_internal = "eager"
    check_differentiable(model, found)
    model._compiled_call_impl = lambda: None
    with pytest.raises(InputError, match="before compiling"):
        check_differentiable(model, found)


def test_quantised_weights_are_refused():
    model = tiny_model("llama", blocks=2)
    check_plain_weights(model, list(model.model.layers))
    weight = model.model.layers[1].mlp.up_proj.weight
    codes = nn.Parameter(weight.data.to(torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.up_proj.weight = codes
    with pytest.raises(InputError, match=r"block 1: the weight 'mlp.up_proj.weight'.*quantised"):
        check_plain_weights(model, list(model.model.layers))
    model.is_quantized = True
    with pytest.raises(InputError, match="quantised"):
        check_plain_weights(model, [])
