from __future__ import annotations

import gc
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from preln.base.errors import InputError
from preln.heal.rows import isolation
from preln.heal.rows.encode import Encoded
from preln.heal.rows.examples import IGNORED, Examples
from preln.heal.rows.packing import forward_inputs, isolates, pack, padded, plan_windows
from preln.models import ARCHITECTURES, tiny_model

# those whose code takes neither positions nor a mask of its own: they are trained on padded rows
REFUSED = {"bloom"}
# beyond the sliding window of 64 tokens that some tiny models have
SIZES = [90, 75, 20, 30, 9]

lengths = st.integers(1, 24).flatmap(
    lambda length: st.tuples(st.lists(st.integers(1, length), max_size=40), st.just(length))
)


def _slow_plan(sizes: list[int], length: int) -> list[list[int]]:
    """Best-fit decreasing as the textbook words it: look at every window for every row."""
    windows: list[list[int]] = []
    for row in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rooms = [length - sum(sizes[i] for i in window) for window in windows]
        fitting = [(room, place) for place, room in enumerate(rooms) if room >= sizes[row]]
        if fitting:
            windows[min(fitting)[1]].append(row)
        else:
            windows.append([row])
    return sorted(sorted(window) for window in windows)


@given(lengths)
@example(([3, 3, 3, 2, 2, 2], 7))
@example(([5] * 9, 5))
def test_windows_are_those_of_the_textbook(case: tuple[list[int], int]) -> None:
    sizes, length = case
    found = plan_windows(sizes, length)
    assert found == _slow_plan(sizes, length)
    assert sorted(row for window in found for row in window) == list(range(len(sizes)))
    assert all(sum(sizes[row] for row in window) <= length for window in found)
    # no two windows could be one
    fills = sorted(sum(sizes[row] for row in window) for window in found)
    assert len(fills) < 2 or fills[0] + fills[1] > length


def test_the_order_of_arrival_would_need_more_windows() -> None:
    sizes = [3, 3, 3, 7, 7, 7]
    arrivals, room = 0, 0
    for size in sizes:
        arrivals, room = (arrivals, room - size) if size <= room else (arrivals + 1, 10 - size)
    assert plan_windows(sizes, 10) == [[0, 3], [1, 4], [2, 5]]
    assert arrivals == 4


def test_rows_that_fit_no_window_are_refused() -> None:
    for sizes in ([3, 6], [0]):
        with pytest.raises(InputError, match=r"row \d: \d tokens do not fit a window of 5"):
            plan_windows(sizes, 5)


def _rows(sizes: list[int], *, seed: int = 0) -> list[Encoded]:
    """Random rows of which the second half counts; every other one is a text."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, size in enumerate(sizes):
        ids = torch.randint(1, 512, (size,), generator=generator).tolist()
        text = index % 2 == 0
        made.append(Encoded(ids, ids if text else [IGNORED] * (size // 2) + ids[size // 2 :], text=text))
    return made


@given(lengths.filter(lambda case: case[1] > 1), st.integers(0, 2))
def test_packing_loses_and_invents_nothing(case: tuple[list[int], int], longer: int) -> None:
    sizes, length = case
    rows = _rows([size * (1 + longer) for size in sizes] + [length])
    packed, apart = pack(rows, length, pad=7), padded(rows, length, pad=7)
    assert (packed.tokens, packed.supervised) == (apart.tokens, apart.supervised)
    assert len(packed) <= len(apart)
    assert _documents(packed) == sorted(_documents(apart))
    again = pack(rows, length, pad=7)
    assert again.fingerprint() == packed.fingerprint()
    if packed.documents is None:
        assert packed.fingerprint() == apart.fingerprint()
        return
    real = packed.documents >= 0
    assert bool((packed.input_ids[~real] == 7).all())
    assert bool((packed.labels[~real] == IGNORED).all())
    mask = torch.ones_like(real) if packed.attention_mask is None else packed.attention_mask
    assert torch.equal(mask.bool(), real)


def _documents(examples: Examples) -> list[tuple[list[int], list[int]]]:
    """(ids, labels but for the first) of every document, sorted."""
    documents = examples.documents
    if documents is None:
        full = torch.ones_like(examples.input_ids)
        documents = (full if examples.attention_mask is None else examples.attention_mask) - 1
    found = []
    for window, numbers in enumerate(documents):
        runs, counts = torch.unique_consecutive(numbers, return_counts=True)
        kept = [run for run in runs.tolist() if run >= 0]
        assert kept == list(range(len(kept)))
        assert -1 not in runs.tolist()[: len(kept)]
        start = 0
        for count in counts.tolist()[: len(kept)]:
            place = slice(start, start + count)
            labels = examples.labels[window, place].tolist()
            if examples.documents is not None:
                assert labels[0] == IGNORED
            found.append((examples.input_ids[window, place].tolist(), labels[1:]))
            start += count
    return sorted(found)


def test_rows_without_a_supervised_token_are_left_out() -> None:
    silent = Encoded([1, 2, 3, 4], [IGNORED, IGNORED, IGNORED, 4])
    assert len(pack([silent, silent], 8)) == 1
    assert pack([silent, *_rows([6])], 3).supervised == 4
    with pytest.raises(InputError, match="length=3"):
        pack([silent], 3)


def _packed(sizes: list[int] = SIZES) -> tuple[list[Encoded], Examples]:
    rows = [Encoded(row.ids, row.ids if row.text else row.labels) for row in _rows(sizes)]
    examples = pack(rows, 125)
    assert examples.documents is not None
    assert len(examples) == 2
    return rows, examples


def _summed(model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    logits = model(**inputs).logits.double()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _alone(model: Any, rows: list[Encoded]) -> float:
    """The sum of losses with every row in a pass of its own."""
    total = 0.0
    for row in rows:
        log_p = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        total -= sum(
            float(log_p[t - 1, label]) for t, label in enumerate(row.labels) if t and label != IGNORED
        )
    return total


@pytest.mark.integration
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_have_the_loss_that_they_have_alone(architecture: str) -> None:
    model = tiny_model(architecture, blocks=2)
    rows, examples = _packed()
    if architecture in REFUSED:
        reason = isolates(model)
        assert reason is not None
        assert reason.startswith(type(model).__name__)
        with pytest.raises(InputError, match=rf"^{type(model).__name__}: .*: ask for padding"):
            forward_inputs(model, examples)
        return
    assert isolates(model) is None
    with torch.no_grad():
        wanted = _alone(model, rows)
        found = float(_summed(model, forward_inputs(model, examples), examples.labels))
        mixed = float(_summed(model, {"input_ids": examples.input_ids}, examples.labels))
        assert found == pytest.approx(wanted, rel=1e-6)
        # a pass that knows nothing of documents: the comparison can fail
        assert mixed != pytest.approx(wanted, rel=1e-4)
        assert examples.documents is not None
        first = examples.documents == 0
        other = Examples(
            torch.where(first, (examples.input_ids + 1) % 512, examples.input_ids),
            *(examples.labels, examples.attention_mask, examples.documents),
        )
        before, after = (model(**forward_inputs(model, e)).logits for e in (examples, other))
        later = examples.documents > 0
        assert torch.allclose(before[later], after[later], atol=1e-5)
        assert not torch.allclose(before[first], after[first], atol=1e-2)


@pytest.mark.integration
def test_packed_gradients_are_the_sum_of_those_alone() -> None:
    model = tiny_model("gemma2", blocks=2)
    rows, examples = _packed()
    _summed(model, forward_inputs(model, examples), examples.labels).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in rows:
        one = padded([row], 125)
        _summed(model, forward_inputs(model, one), one.labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.integration
def test_padded_rows_are_passed_with_their_mask_alone() -> None:
    model = tiny_model("bloom", blocks=2)
    rows = _packed()[0]
    examples = padded(rows, 125)
    inputs = forward_inputs(model, examples)
    assert set(inputs) == {"input_ids", "use_cache", "attention_mask"}
    with torch.no_grad():
        found = float(_summed(model, inputs, examples.labels))
        assert found == pytest.approx(_alone(model, rows), rel=1e-6)
    assert set(forward_inputs(model, Examples(examples.input_ids, examples.labels))) == {
        "input_ids",
        "use_cache",
    }


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mamba2", "lfm2"])
def test_models_with_a_state_are_refused(kind: str, dtype: torch.dtype) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    if kind == "mamba2":
        small |= {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}
    else:
        small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
        small["layer_types"] = ["conv", "full_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small)).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    reason = isolates(model)
    assert reason is not None
    assert "packed rows mix in every form" in reason


@pytest.mark.integration
def test_half_precision_is_no_reason_to_refuse() -> None:
    for architecture in ("llama", "mixtral", "gpt2", "mpt"):
        assert isolates(tiny_model(architecture, blocks=2).to(torch.bfloat16)) is None


@pytest.mark.integration
def test_the_trial_sees_forms_that_do_not_isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    def restarts(documents: Tensor) -> Tensor:
        return isolation.positions_of(documents)

    def backwards(documents: Tensor) -> Tensor:
        return isolation.mask_of(documents) | isolation.mask_of(documents).mT

    def leaky(documents: Tensor) -> Tensor:
        mask = isolation.mask_of(documents).clone()
        mask[..., 1:, 0] = True  # the first token of the window is seen from everywhere
        return mask

    def wrong(form: dict[str, Any]) -> str | None:
        monkeypatch.setattr(isolation, "_FORMS", form)
        return isolates(tiny_model("gpt2", blocks=2))

    assert (
        wrong({"right": lambda d, _: {"attention_mask": isolation.mask_of(d), "position_ids": restarts(d)}})
        is None
    )
    for name, form in {
        "nothing": lambda d, _: {},
        "no positions": lambda d, _: {"attention_mask": isolation.mask_of(d)},
        "future": lambda d, _: {"attention_mask": backwards(d), "position_ids": restarts(d)},
        "leak": lambda d, _: {"attention_mask": leaky(d), "position_ids": restarts(d)},
    }.items():
        reason = wrong({name: form})
        assert reason is not None
        assert f"{name}: off by" in reason


class _Leaking(nn.Module):
    """A recurrent toy whose rounding is coarse, and which mixes documents in one chosen way."""

    def __init__(self, leak: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.embedding = nn.Embedding(64, 64)
        self.embedding.weight.data = torch.eye(64)
        self.leak = leak

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        x = self.embedding(input_ids)
        length = input_ids.shape[1]
        rounding = 0.01 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(length))
        if position_ids is None:
            return SimpleNamespace(logits=x.cumsum(1) + rounding)
        begins = position_ids == 0
        # what each document would be by itself
        total = x.cumsum(1)
        before = torch.where(begins[..., None], total - x, 0).cummax(1).values
        y = total - before + rounding
        if self.leak == "weak":
            y[:, 1:] += 0.1 * x[:, :1]
        elif self.leak == "first":
            y[:, 1:][begins[:, 1:]] += 0.5
        return SimpleNamespace(logits=y)


def test_weak_and_passing_leaks_are_seen_behind_coarse_rounding() -> None:
    assert isolates(_Leaking("none")) is None  # pyright: ignore
    for leak in ("weak", "first"):
        reason = isolates(_Leaking(leak))  # pyright: ignore
        assert reason is not None, leak
        assert "positions: off by" in reason


@pytest.mark.integration
def test_a_given_mask_is_refused_beyond_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows show nothing of it: the trial passes, and the wide window is refused all the same."""
    model = tiny_model("gemma2", blocks=2)
    rows, examples = _packed()
    form = isolation._FORMS["added mask and positions"]
    monkeypatch.setattr(isolation, "_FORMS", {"added mask and positions": form})
    assert isolates(model) is None
    with pytest.raises(
        InputError, match="120 tokens are longer than its sliding window of 64: ask for padding"
    ):
        forward_inputs(model, examples)
    with torch.no_grad():
        inputs = {"input_ids": examples.input_ids, **form(examples.documents, torch.float32)}
        assert float(_summed(model, inputs, examples.labels)) != pytest.approx(_alone(model, rows), rel=1e-5)
    narrow = pack(_rows([20, 30, 9]), 60)
    assert set(forward_inputs(model, narrow)) == {"input_ids", "use_cache", "attention_mask", "position_ids"}


@pytest.mark.integration
def test_the_trial_is_made_once_a_model_and_leaves_no_trace() -> None:
    model = tiny_model("llama", blocks=2)
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.random.get_rng_state()
    examples = _packed()[1]
    first = forward_inputs(model, examples)
    tried = len(calls)
    assert tried > 0
    second = forward_inputs(model, examples)
    assert isolates(model) is None
    assert len(calls) == tried
    assert torch.equal(first["position_ids"], second["position_ids"])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    # another implementation of attention is another question
    model.set_attn_implementation("eager")
    assert isolates(model) is None
    assert len(calls) > tried
    kept = len(isolation._answers)
    del model
    gc.collect()
    assert len(isolation._answers) < kept


@pytest.mark.integration
def test_adapters_are_seen_through() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(
        tiny_model("llama", blocks=2), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
    )
    rows, examples = _packed()
    with torch.no_grad():
        wrapped.eval()
        found = float(_summed(wrapped, forward_inputs(wrapped, examples), examples.labels))
        assert found == pytest.approx(_alone(wrapped, rows), rel=1e-6)
    bloom = peft.get_peft_model(
        tiny_model("bloom", blocks=2), peft.LoraConfig(target_modules=["query_key_value"])
    )
    reason = isolates(bloom)
    assert reason is not None
    assert reason.startswith("BloomForCausalLM")


@pytest.mark.integration
def test_a_model_that_is_not_finite_is_refused() -> None:
    model = tiny_model("llama", blocks=1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    assert isolates(model) is not None
