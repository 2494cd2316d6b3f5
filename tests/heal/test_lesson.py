from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from preln.base.errors import InputError
from preln.heal import TrainingSettings, override, train
from preln.heal.rows.examples import batch_rows
from preln.models import drop_blocks, tiny_model

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration


def stream(model, ids):
    seen = []
    hooks = [b.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for b in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, a: seen.append(a[0])))
    logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_distillation_equals_the_loss_written_out(weight):
    teacher, tokens = tiny_model("llama", blocks=4), random_tokens()
    small = drop_blocks(teacher, [2])
    recipe = override("distill", next_token_weight=weight, temperature=2.0)
    plan = settings(steps=1)
    result = train(small, tokens, recipe=recipe, settings=plan, teacher=teacher, drop=[2])
    ids = tokens[batch_rows(len(tokens), 4, 0, 0)]
    with torch.no_grad():
        mine, wanted = stream(small, ids)[1][:, :-1], stream(teacher, ids)[1][:, :-1]
    p = (wanted / 2).softmax(-1)
    kl = (p * ((wanted / 2).log_softmax(-1) - (mine / 2).log_softmax(-1))).sum(-1)
    entropy = F.cross_entropy(mine.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = (1 - weight) * 4 * kl.mean() + weight * entropy.mean()
    assert result.history["loss"].iloc[0] == pytest.approx(float(expected), rel=1e-4)
    assert result.manifest["teacher"]["drop"] == [2]


def test_the_seam_equals_the_loss_written_out_and_falls():
    teacher, tokens = tiny_model("llama", blocks=4), random_tokens()
    small = drop_blocks(teacher, [2])
    plan = settings(steps=30, learning_rate=3e-3)
    result = train(small, tokens, recipe="seam", settings=plan, teacher=teacher, drop=[2])
    ids = tokens[batch_rows(len(tokens), 4, 0, 0)]
    with torch.no_grad():
        mine, wanted = stream(small, ids)[0][2], stream(teacher, ids)[0][3]
    expected = (mine - wanted).square().mean(-1).sum() / ids.numel()
    losses = result.history.query("split == 'train'")["loss"].tolist()
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]
    trained = {name.split(".")[2] for name in result.trained}
    assert trained == {"1"}  # the block in front of the cut


def test_a_student_of_itself_has_nothing_to_learn():
    """Identity: the distance to itself is 0, and no weight moves."""
    model, tokens = tiny_model("llama", blocks=4), random_tokens()
    result = train(copy.deepcopy(model), tokens, recipe="distill", settings=settings(steps=2), teacher=model)
    losses = result.history.query("split == 'train'")["loss"]
    assert abs(losses.iloc[0]) < 1e-5


def test_a_recipe_with_a_teacher_needs_one_that_fits():
    model, tokens = tiny_model("llama", blocks=4), random_tokens()
    plan = TrainingSettings(steps=1, batch_size=4)
    with pytest.raises(InputError, match="--teacher"):
        train(drop_blocks(model, [2]), tokens, recipe="distill", settings=plan)
    with pytest.raises(InputError, match="not the student's 3"):
        train(drop_blocks(model, [2]), tokens, recipe="seam", settings=plan, teacher=model, drop=[1, 2])
