"""Replacements that read gradients or train: GRASP, LLM-Streamline, ELDeR."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from preln.base.errors import InputError
from preln.models import find_blocks, tiny_model
from preln.models.residual import as_tokens
from preln.prune import score
from preln.prune.replace import elder_weights, replace_blocks
from preln.prune.replace.elder import weighted_updates
from preln.prune.replace.grasp import importance, linear_maps, weight_gradients
from preln.prune.replace.streamline import choose_run, mean_squared_error, record

pytestmark = pytest.mark.integration
BATCH = torch.randint(1, 512, (6, 14), generator=torch.Generator().manual_seed(0))
MODELS = ["llama", "gpt2", "gemma2"]


def loss_of(model, shift=1):
    """Mean cross entropy, written out; ``shift`` 2 is what shifting the labels twice measures."""
    logits = model(BATCH, use_cache=False).logits[:, :-shift]
    return functional.cross_entropy(logits.flatten(0, 1).double(), BATCH[:, shift:].flatten())


@pytest.mark.parametrize("architecture", MODELS)
def test_grasp_ranks_by_the_slope_of_the_loss_along_each_singular_value(architecture):
    """Slow oracle: move one singular value, measure the loss, and take the difference quotient."""
    model = tiny_model(architecture).double()
    gradients = weight_gradients(model, BATCH, [2])[2]
    block = find_blocks(model)[1][2]
    name, weight = next((k, p) for k, p in linear_maps(block).items() if "mlp" in k)
    u, s, vh, value = importance(weight, gradients[name])
    torch.testing.assert_close((u * s) @ vh, weight.detach())
    with torch.no_grad():
        for k in (0, 3, 20):
            direction, step = torch.outer(u[:, k], vh[k]), 1e-2
            ends = []
            for sign in (1, -1):
                weight += sign * step * direction
                ends.append(float(loss_of(model)))
                weight -= sign * step * direction
            slope = (ends[0] - ends[1]) / (2 * step)
            # norms and softmax run in float32 inside, and the loss is read off in it
            assert float(value[k]) == pytest.approx(abs(float(s[k]) * slope), abs=3e-5)


def test_grasp_shifts_the_labels_once():
    model = tiny_model("llama")
    found = weight_gradients(model, BATCH, [1])[1]["mlp.down_proj.weight"]
    weight = find_blocks(model)[1][1].mlp.down_proj.weight
    once, twice = (torch.autograd.grad(loss_of(model, shift), weight)[0] for shift in (1, 2))
    torch.testing.assert_close(found, once, rtol=1e-4, atol=1e-7)
    # negative control: the gradient of the published code points elsewhere, and keeps other directions
    assert torch.cosine_similarity(found.flatten(), twice.flatten(), dim=0) < 0.9
    kept = [set(importance(weight, g)[3].topk(6).indices.tolist()) for g in (found, once, twice)]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("architecture", [*MODELS, "mixtral"])
def test_grasp_lowers_the_rank_and_keeps_everything_else(architecture):
    model = tiny_model(architecture)
    new, plan = replace_blocks(model, BATCH, "grasp", drop=2, ratio=0.25)
    order = score(model, BATCH, ["block_influence"]).sort_values("rank")["layer"].tolist()
    assert plan.settings["replaced"] == tuple(sorted(order[:2])) and plan.drop == ()
    maps = {id(p) for i in plan.settings["replaced"] for p in linear_maps(find_blocks(new)[1][i]).values()}
    for (name, before), after in zip(model.named_parameters(), new.parameters(), strict=True):
        if id(after) not in maps:
            assert torch.equal(before, after), name
            continue
        ranks = torch.linalg.matrix_rank(after, rtol=1e-5)
        assert int(ranks.max()) <= round(0.25 * min(after.shape[-2:])), name
        assert not torch.equal(before, after)


def test_grasp_of_everything_is_the_model():
    model = tiny_model("gpt2")
    new, _ = replace_blocks(model, BATCH, "grasp", drop=3, ratio=1.0)
    with torch.no_grad():
        torch.testing.assert_close(new(BATCH).logits, model(BATCH).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", MODELS)
def test_streamline_learns_the_run_better_than_its_start_and_the_mean(architecture):
    model = tiny_model(architecture, blocks=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new, plan = replace_blocks(model, BATCH, "streamline", drop=3, steps=80, learning_rate=3e-3)
    start = plan.settings["trained"]
    assert plan.drop == (start + 1, start + 2) and len(find_blocks(new)[1]) == 3
    examples = record(model, as_tokens(BATCH), start, 3, 4)
    first, learnt = find_blocks(model)[1][start], find_blocks(new)[1][start]
    error = mean_squared_error(learnt, examples)
    assert error < 0.8 * mean_squared_error(first, examples)
    targets = torch.cat([e.leaving.flatten(0, 1) for e in examples])
    assert error < float((targets - targets.mean(0)).square().mean())
    # slow oracle of the error: hidden states of the whole models, layer by layer
    with torch.no_grad():
        mine = new(BATCH, use_cache=False, output_hidden_states=True).hidden_states
        whole = model(BATCH, use_cache=False, output_hidden_states=True).hidden_states
    if start + 1 < len(mine) - 1:  # the last entry is behind the final norm
        slow = float((mine[start + 1] - whole[start + 3]).square().mean())
        assert error == pytest.approx(slow, rel=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    again, _ = replace_blocks(model, BATCH, "streamline", drop=3, steps=80, learning_rate=3e-3)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters(), strict=True))


def test_streamline_chooses_the_run_of_highest_cosine():
    model = tiny_model("llama", blocks=5)
    with torch.no_grad():
        states, x = [], None
        handles = [
            b.register_forward_hook(lambda _, args, out: states.extend([args[0], out][bool(states) :]))
            for b in find_blocks(model)[1]
        ]
        model(BATCH, use_cache=False)
    for handle in handles:
        handle.remove()
    assert x is None and len(states) == 6
    cosines = [float(torch.cosine_similarity(states[s], states[s + 2], dim=-1).mean()) for s in range(4)]
    assert choose_run(model, as_tokens(BATCH), 2, set()) == int(np.argmax(cosines))
    best = int(np.argmax(cosines))
    assert choose_run(model, as_tokens(BATCH), 2, {best}) not in (best - 1, best)


def test_streamline_that_learns_nothing_is_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="mean squared error went from"):
        replace_blocks(model, BATCH, "streamline", drop=2, steps=3, learning_rate=50.0)
    with pytest.raises(InputError, match="at least 2"):
        replace_blocks(model, BATCH, "streamline", drop=1)
    with pytest.raises(InputError, match="no run"):
        choose_run(model, as_tokens(BATCH), 2, {1, 2})


def test_streamline_stores_half_precision_as_such():
    model = tiny_model("llama", blocks=5).to(torch.bfloat16)
    new, _ = replace_blocks(model, BATCH, "streamline", drop=3, steps=60, learning_rate=3e-3)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", MODELS)
def test_a_weight_of_one_changes_nothing_and_of_zero_removes(architecture):
    from preln.models import drop_blocks

    model = tiny_model(architecture)
    blocks = find_blocks(model)[1]
    with torch.no_grad():
        whole = model(BATCH, use_cache=False).logits
        with weighted_updates(blocks, torch.ones(4)):
            torch.testing.assert_close(model(BATCH, use_cache=False).logits, whole, rtol=0, atol=1e-4)
        with weighted_updates(blocks, torch.tensor([1.0, 0.0, 1.0, 0.0])):
            gone = model(BATCH, use_cache=False).logits
        without = drop_blocks(model, [1, 3])(BATCH, use_cache=False).logits
    torch.testing.assert_close(gone, without, rtol=0, atol=1e-4)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in blocks)


def test_elder_takes_the_step_of_adam_on_a_slow_gradient():
    """Adam's first step is the sign of the gradient, taken here by difference quotients in float64."""
    model = tiny_model("gpt2").double()
    blocks, penalty = find_blocks(model)[1], 0.3
    gradient = []
    with torch.no_grad():
        for k in range(4):
            ends = []
            for sign in (1, -1):
                weights = torch.ones(4, dtype=torch.float64)
                weights[k] += sign * 1e-4
                with weighted_updates(blocks, weights):
                    ends.append(float(loss_of(model)) + penalty * float(weights.abs().sum()))
            gradient.append((ends[0] - ends[1]) / 2e-4)
    found = elder_weights(model, BATCH, steps=1, learning_rate=0.01, penalty=penalty, batch_size=6)
    np.testing.assert_allclose(found, 1.0 - 0.01 * np.sign(gradient), atol=1e-6)


def test_elder_removes_the_least_weights_and_is_repeatable():
    model = tiny_model("llama", blocks=6)
    settings = {"steps": 10, "learning_rate": 0.05, "penalty": 0.05}
    weights = elder_weights(model, BATCH, seed=3, **settings)
    assert weights.shape == (6,)
    np.testing.assert_array_equal(weights, elder_weights(model, BATCH, seed=3, **settings))
    new, plan = replace_blocks(model, BATCH, "elder", drop=2, seed=3, **settings)
    assert plan.drop == tuple(sorted(np.argsort(np.abs(weights))[:2].tolist()))
    assert len(find_blocks(new)[1]) == 4
    # the penalty pulls every weight down; without it they need not fall
    strong = elder_weights(model, BATCH, seed=3, **{**settings, "penalty": 5.0})
    assert (strong < weights).all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
