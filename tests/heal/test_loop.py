from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import preln
from preln.base.errors import InputError
from preln.heal import apply_trained, train
from preln.heal.rows.examples import Examples, batch_rows
from preln.heal.training.step import Stepper
from preln.models import tiny_model, tiny_tokenizer, token_losses
from preln.models.through import states_at

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration


def by_hand(
    model: torch.nn.Module, names: set[str], tokens: torch.Tensor, plan: object
) -> dict[str, torch.Tensor]:
    """The slow oracle: AdamW written out from Loshchilov and Hutter 2019, algorithm 2, on plain autograd."""
    model = copy.deepcopy(model)
    weights = {n: p for n, p in model.named_parameters() if n in names}
    first = {n: torch.zeros_like(p) for n, p in weights.items()}
    second = {n: torch.zeros_like(p) for n, p in weights.items()}
    for step in range(plan.steps):
        ids = tokens[batch_rows(len(tokens), plan.batch_size, plan.seed, step)]
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, 512), ids[:, 1:].reshape(-1))
        grads = torch.autograd.grad(loss, list(weights.values()))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        rate = plan.rate(step)
        with torch.no_grad():
            for (name, p), g in zip(weights.items(), grads, strict=True):
                g = g * min(1.0, plan.max_grad_norm / (float(norm) + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p -= rate * (m / (v.sqrt() + 1e-8) + plan.weight_decay * p)
    return {n: p.detach() for n, p in weights.items()}


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_three_steps_equal_adamw_written_by_hand(blocks: int) -> None:
    model, tokens = tiny_model("llama").double(), random_tokens()
    plan = settings(steps=3, weight_decay=0.1, max_grad_norm=0.5, schedule="cosine", warmup_steps=1)
    result = train(model, tokens, recipe=f"partial-{blocks}" if blocks else "head", settings=plan)
    expected = by_hand(model, set(result.trained), tokens, plan)
    assert expected.keys() == result.trained.keys()
    for name, tensor in expected.items():
        # moments are in float64, but the loss and the norms inside the model are computed in float32
        torch.testing.assert_close(result.trained[name], tensor, rtol=0, atol=2e-5, msg=name)
    other = by_hand(
        model, set(result.trained), tokens, settings(steps=3, weight_decay=0.1, learning_rate=1e-3)
    )
    gap = max(float((result.trained[n] - t).abs().max()) for n, t in other.items())
    assert gap > 1e-4, "the comparison cannot tell one learning rate from another"


@pytest.mark.parametrize("recipe", ["head", "partial-1"])
def test_three_steps_equal_torch_adamw_to_the_last_bit(recipe: str) -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    plan = settings(steps=3)
    result = train(model, tokens, recipe=recipe, settings=plan)
    mine = copy.deepcopy(model).requires_grad_(False)
    weights = [p.requires_grad_() for n, p in mine.named_parameters() if n in result.trained]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = plan.rate(step)
        ids = tokens[batch_rows(len(tokens), 4, 0, step)]
        state = states_at(mine, mine.model.layers, {"input_ids": ids, "use_cache": False}, [4])[4]
        # the same shapes as in the loop: final norm and head at the tokens that count alone
        logits = mine.lm_head(mine.model.norm(state[:, :-1].flatten(0, 1)))
        losses = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        optimizer.zero_grad()
        (losses.sum() / (4 * 15)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        assert (
            float(losses.detach().sum(dtype=torch.float64)) / 60
            == result.history.loc[result.history["split"] == "train", "loss"].iloc[step]
        )
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


@pytest.mark.parametrize("recipe", ["head", "partial-1", "partial-3", "lora"])
def test_the_loss_goes_down_and_the_table_tells(recipe: str) -> None:
    model, held_out = tiny_model("llama"), random_tokens(seed=1)
    plan = settings(steps=40, learning_rate=5e-3, eval_every=16)
    result = train(model, random_tokens(24), validation=held_out, recipe=recipe, settings=plan)
    table = result.history
    assert list(table.columns) == ["step", "tokens", "seconds", "split", "loss", "learning_rate"]
    measured = table[table["split"] == "validation"]
    assert measured["step"].tolist() == [0, 16, 32, 40]
    assert table[table["split"] == "train"]["step"].tolist() == list(range(1, 41))
    assert measured["tokens"].tolist() == [0, 16 * 64, 32 * 64, 40 * 64]
    assert table["seconds"].is_monotonic_increasing
    rates = table[table["split"] == "train"]["learning_rate"].tolist()
    assert rates == [plan.rate(step) for step in range(40)]
    assert result.manifest["loss_before"] == pytest.approx(float(token_losses(model, held_out)[0].mean()))
    assert result.manifest["loss_after"] == pytest.approx(
        float(token_losses(result.model, held_out)[0].mean()), abs=1e-4
    )
    assert result.manifest["loss_after"] < result.manifest["loss_before"] - 0.2


def test_a_vanishing_rate_learns_nothing() -> None:
    result = train(
        tiny_model("llama"),
        random_tokens(24),
        validation=random_tokens(seed=1),
        recipe="partial-3",
        settings=settings(steps=40, learning_rate=1e-9),
    )
    assert abs(result.manifest["loss_after"] - result.manifest["loss_before"]) < 1e-3


@pytest.mark.parametrize("recipe", ["partial-1", "lora"])
def test_trained_tensors_rebuild_the_model_bit_for_bit(recipe: str) -> None:
    model = tiny_model("llama")
    result = train(model, random_tokens(), recipe=recipe, settings=settings())
    rebuilt = apply_trained(model, recipe, result.trained).state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(rebuilt[name], tensor), name
    with pytest.raises(InputError, match="does not belong"):
        apply_trained(model, "head", result.trained)
    with pytest.raises(InputError, match="does not fit"):
        first, *rest = result.trained
        apply_trained(model, recipe, {first: torch.zeros(1), **{n: result.trained[n] for n in rest}})


def test_portions_make_the_same_step_up_to_rounding() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    whole = train(model, tokens, recipe="partial-1", settings=settings(steps=2))
    split = train(model, tokens, recipe="partial-1", settings=settings(steps=2, gradient_accumulation=4))
    for name, tensor in whole.trained.items():
        torch.testing.assert_close(split.trained[name], tensor, rtol=0, atol=1e-4)


def test_best_weights_are_those_of_the_lowest_validation_loss() -> None:
    model, held_out = tiny_model("llama"), random_tokens(seed=1)
    wild = settings(steps=4, learning_rate=5.0, eval_every=1, warmup_steps=0, max_grad_norm=None)
    last = train(model, random_tokens(), validation=held_out, recipe="head", settings=wild)
    best = train(
        model, random_tokens(), validation=held_out, recipe="head", settings=wild.replaced(select="best")
    )
    assert last.manifest["loss_after"] > last.manifest["best_loss"]
    assert best.manifest["loss_after"] == best.manifest["best_loss"]
    assert best.manifest["selected_step"] == best.manifest["best_step"]
    measured = float(token_losses(best.model, held_out)[0].double().mean())
    assert measured == pytest.approx(best.manifest["best_loss"])
    with pytest.raises(InputError, match="validation"):
        train(model, random_tokens(), recipe="head", settings=wild.replaced(select="best"))


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_what_is_not_finite_stops_the_run_and_names_the_step(where: str) -> None:
    model = tiny_model("llama")
    if where == "weights":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
        expected = r"loss is not finite at step 1, first block 0, mlp\.up_proj: lower"
        with pytest.raises(InputError, match=expected):
            train(model, random_tokens(), recipe="partial-1", settings=settings())
        with pytest.raises(
            InputError, match=r"validation loss is not finite at step 0, first block 0, mlp\.up"
        ):
            held_out = random_tokens(seed=1)
            train(model, random_tokens(), validation=held_out, recipe="lora", settings=settings())
    else:
        plan = settings(learning_rate=1e30, max_grad_norm=None, warmup_steps=0)
        with pytest.raises(InputError, match=r"not finite at step [2-6], first .*: lower the learning rate"):
            train(model, random_tokens(), recipe="partial-1", settings=plan)


def test_a_gradient_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stepper.gradients

    def spoilt(self: Stepper, batch: Examples, rows: list[int], step: int) -> float:
        loss = original(self, batch, rows, step)
        if step == 2:
            name = next(n for n in self.prepared.parameters if n.endswith("3.mlp.up_proj.weight"))
            gradient = self.prepared.parameters[name].grad
            assert gradient is not None
            gradient[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Stepper, "gradients", spoilt)
    named = (
        r"gradient is not finite at step 3, first the gradient of model\.layers\.3\.mlp\.up_proj\.weight: l"
    )
    with pytest.raises(InputError, match=named):
        train(tiny_model("llama"), random_tokens(), recipe="partial-1", settings=settings())


def test_seeds_decide_and_the_callers_generator_is_left_alone() -> None:
    model, tokens = tiny_model("llama"), random_tokens()
    torch.manual_seed(3)
    first = train(model, tokens, recipe="lora", settings=settings())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(99)
    again = train(model, tokens, recipe="lora", settings=settings())
    other = train(model, tokens, recipe="lora", settings=settings(seed=1))
    for name, tensor in first.trained.items():
        assert torch.equal(again.trained[name], tensor)
    assert any(not torch.equal(other.trained[name], tensor) for name, tensor in first.trained.items())


def test_the_verb() -> None:
    model = tiny_model("llama")
    healed = preln.heal(model, random_tokens(), recipe="partial-1", steps=2, learning_rate=1e-3)
    assert not healed.training
    assert not torch.equal(healed.lm_head.weight, model.lm_head.weight)
    rows = [{"instruction": "Say a.", "output": "a"}, {"text": "some text"}]
    assert preln.heal(model, rows, "head", tokenizer=tiny_tokenizer(), steps=1, validation=rows) is not model
    with pytest.raises(InputError, match="lr: not a training setting"):
        preln.heal(model, random_tokens(), lr=1.0)
