from __future__ import annotations

import copy
import math

import pytest
import torch

from preln.base.errors import InputError
from preln.heal.training.teacher import Teacher, distillation_loss, seam_loss
from preln.models import drop_blocks, find_blocks, tiny_model
from preln.models.through import states_at

from .helpers import random_tokens

TAUS = [0.5, 1.0, 3.0]


def logits(n: int = 5, v: int = 7, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(n, v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_kl(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> float:
    """tau^2 sum_n sum_v p log(p / q), one number at a time."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        zs, zt = sum(math.exp(x / tau) for x in s), sum(math.exp(x / tau) for x in t)
        for x, y in zip(s, t, strict=True):
            p, q = math.exp(y / tau) / zt, math.exp(x / tau) / zs
            total += p * math.log(p / q)
    return tau**2 * total


@pytest.mark.parametrize("tau", TAUS)
def test_distillation_loss_is_the_divergence_token_by_token(tau: float) -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    found = float(distillation_loss(student, teacher, tau))
    assert found == pytest.approx(slow_kl(student, teacher, tau), rel=1e-12)
    assert found != pytest.approx(slow_kl(teacher, student, tau), rel=1e-2), "the arguments are told apart"
    assert float(distillation_loss(teacher, teacher + 2.5, tau)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_its_gradient_is_tau_times_the_difference_of_probabilities(tau: float) -> None:
    student, teacher = logits(seed=0).requires_grad_(), logits(seed=1).requires_grad_()
    (slope,) = torch.autograd.grad(distillation_loss(student, teacher, tau), student)
    expected = tau * ((student / tau).softmax(-1) - (teacher / tau).softmax(-1))
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-10, atol=1e-12)
    without = expected.detach() / tau
    assert tau == 1.0 or float((slope - without).abs().max()) > 1e-2, "the factor is told apart"
    assert teacher.grad is None


def test_impossible_tokens_add_nothing_and_large_logits_stay_finite() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    masked = [x.clone().index_fill(1, torch.tensor([2]), -math.inf) for x in (student, teacher)]
    masked[0].requires_grad_()
    loss = distillation_loss(*masked, 2.0)
    kept = [x[:, [0, 1, 3, 4, 5, 6]] for x in (student, teacher)]
    assert float(loss.detach()) == pytest.approx(slow_kl(*kept, 2.0), rel=1e-12)
    (slope,) = torch.autograd.grad(loss, masked[0])
    assert bool(torch.isfinite(slope).all())
    huge = distillation_loss(1e4 * student.half(), 1e4 * student.half().float())
    assert huge.dtype == torch.float32
    assert float(distillation_loss(1e4 * student, 1e4 * student)) == 0.0


def test_seam_loss_is_the_squared_error_and_its_gradient() -> None:
    student, teacher = logits(seed=2).requires_grad_(), logits(seed=3)
    loss = seam_loss(student, teacher)
    slow = sum(
        sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / 7
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    )
    assert float(loss.detach()) == pytest.approx(slow, rel=1e-12)
    (slope,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(slope, 2 * (student - teacher).detach() / 7)
    assert float(seam_loss(teacher, teacher)) == 0.0


def test_shapes_and_temperatures_are_checked() -> None:
    for loss in (distillation_loss, seam_loss):
        with pytest.raises(InputError, match=r"\(5, 7\) and \(5, 8\) differ"):
            loss(logits(), logits(v=8))
    with pytest.raises(InputError, match="tau=0"):
        distillation_loss(logits(), logits(), 0)


@pytest.mark.integration
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "phi3"])
def test_states_and_logits_are_those_of_the_model(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = random_tokens(3, 9)
    inputs = {"input_ids": ids, "use_cache": False}
    teacher = Teacher(model, [1])
    states = teacher.states(inputs, range(5))
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
    for depth in range(4):
        torch.testing.assert_close(states[depth], plain.hidden_states[depth], rtol=0, atol=0)
    found = teacher.logits(states[4].flatten(0, 1), ids.flatten())
    torch.testing.assert_close(found, plain.logits.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert float((found.roll(1, 0) - plain.logits.flatten(0, 1)).abs().max()) > 1e-2
    # ordinary tensors: autograd may save them
    weight = torch.ones(64, requires_grad=True)
    (weight * states[2]).sum().backward()
    (torch.ones(512, requires_grad=True) * found).sum().backward()
    assert not states[2].requires_grad


@pytest.mark.integration
def test_one_pass_a_batch_that_ends_at_the_deepest_state() -> None:
    model = tiny_model("llama")
    teacher = Teacher(model, [1, 2])
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(teacher.blocks)]
    teacher.states({"input_ids": random_tokens(2, 5), "use_cache": False}, [3, 1, 1])
    assert ran == [0, 1, 2]
    assert len(handles) == 4
    for handle in handles:
        handle.remove()
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in teacher.blocks)
    for depths in ([], [5], [-1]):
        with pytest.raises(InputError, match="from 0 to 4"):
            teacher.states({"input_ids": random_tokens(2, 5)}, depths)


@pytest.mark.integration
def test_the_teacher_is_left_as_it_is_and_does_not_drop_out() -> None:
    model = tiny_model("gpt2")
    assert model.config.resid_pdrop > 0
    inputs = {"input_ids": random_tokens(2, 5), "use_cache": False}
    calm = Teacher(model).states(inputs, [4])[4]
    model.train()
    before = copy.deepcopy(model.state_dict())
    teacher = Teacher(model)
    assert torch.equal(teacher.states(inputs, [4])[4], calm)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # in training mode it would
        assert not torch.equal(states_at(model, teacher.blocks, inputs, [4])[4], calm)


@pytest.mark.integration
def test_in_front_of_the_seam_nothing_differs_and_behind_it_something_does() -> None:
    model = tiny_model("llama", blocks=6)
    teacher = Teacher(model, [2, 3])
    student = drop_blocks(model, [2, 3])
    teacher.check(student)
    (seam,) = teacher.seams
    inputs = {"input_ids": random_tokens(2, 8), "use_cache": False}
    own = states_at(student, find_blocks(student)[1], inputs, [1, seam.student])
    targets = teacher.states(inputs, [1, seam.teacher])
    assert float(seam_loss(own[1].flatten(0, 1), targets[1].flatten(0, 1)).detach()) == 0.0
    loss = seam_loss(own[seam.student].flatten(0, 1), targets[seam.teacher].flatten(0, 1))
    assert float(loss.detach()) > 1e-3
    loss.backward()
    blocks = find_blocks(student)[1]
    got = [any(p.grad is not None for p in block.parameters()) for block in blocks]
    assert got == [True, True, False, False]


@pytest.mark.integration
def test_students_of_another_model_are_refused() -> None:
    teacher = Teacher(tiny_model("llama", blocks=6), [2, 3])
    with pytest.raises(InputError, match="6 blocks less 2 are not the student's 5"):
        teacher.check(tiny_model("llama", blocks=5))
    wide = tiny_model("llama", blocks=4)
    wide.config.vocab_size = 600
    with pytest.raises(InputError, match="vocab_size is 512, the student's 600"):
        teacher.check(wide)
    with pytest.raises(InputError, match="out of range"):
        Teacher(tiny_model("llama"), [4])
