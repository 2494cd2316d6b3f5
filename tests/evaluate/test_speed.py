from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from preln.base.errors import InputError
from preln.evaluate.decoding import Decoding, evaluating
from preln.evaluate.speed import (
    amdahl_limit,
    cache_bytes,
    compare_speed,
    parameter_bytes,
    share_removed,
    speed,
)
from preln.models import drop_blocks, find_blocks, tiny_model

pytestmark = pytest.mark.integration
SMALL = {"batch_sizes": (1, 3), "prompt": 7, "generate": 4, "repeats": 2}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pruned(model):
    return drop_blocks(model, [2])


def _watch(model):
    """Shapes of the ids of every pass, and how many tokens its cache held before."""
    seen = []

    def look(_, args, kwargs):
        cache = kwargs.get("past_key_values")
        held = 0 if cache is None else cache.get_seq_length()
        seen.append((*kwargs["input_ids"].shape, held))

    return seen, model.register_forward_pre_hook(look, with_kwargs=True)


def test_prefill_runs_the_prompt_once_and_decode_one_token_a_pass_with_the_cache(model):
    seen, handle = _watch(model)
    try:
        speed(model, batch_sizes=(3,), prompt=7, generate=4, repeats=2)
    finally:
        handle.remove()
    one_round = [(3, 7, 0)] + [(3, 1, 7 + i) for i in range(4)]
    assert seen == one_round * 3  # a round to warm up, and two that are timed


def test_the_table_has_a_row_a_phase_and_batch_size(model):
    table = speed(model, **SMALL)
    assert table[["phase", "batch", "tokens"]].to_numpy().tolist() == [
        ["prefill", 1, 7],
        ["decode", 1, 4],
        ["prefill", 3, 21],
        ["decode", 3, 12],
    ]
    assert (table["repeats"] == 2).all()
    assert (table["fastest"] > 0).all()
    assert (table["fastest"] <= table["lower_quartile"]).all()
    assert (table["lower_quartile"] <= table["seconds"]).all()
    assert (table["seconds"] <= table["upper_quartile"]).all()
    assert table["tokens_per_second"].to_numpy() == pytest.approx(table["tokens"] / table["seconds"])
    assert (table["peak_bytes"] > table["parameter_bytes"]).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma2"])
def test_cache_bytes_are_keys_and_values_of_every_block(architecture):
    model = tiny_model(architecture)
    table = speed(model, batch_sizes=(2,), prompt=7, generate=4, repeats=1)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for _, row in table.iterrows():
        held = 7 if row["phase"] == "prefill" else 11
        expected = 4 * 2 * 2 * held * heads * width * 4  # blocks, keys and values, batch, float32
        assert 0 <= row["cache_bytes"] - expected <= 32  # windowed layers count their tokens in a tensor


def test_parameter_bytes_count_a_tied_head_once(model):
    tied = tiny_model("gpt2")
    by_hand = sum(t.numel() * 4 for t in {t.data_ptr(): t for t in tied.parameters()}.values())
    assert parameter_bytes(tied) == by_hand
    assert parameter_bytes(tied) < sum(
        t.numel() * 4 for name, t in tied.state_dict().items() if t.is_floating_point()
    )
    assert cache_bytes(None) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom", "gemma3", "gpt_neox"])
def test_steps_with_the_cache_give_the_logits_of_whole_passes(architecture):
    model = tiny_model(architecture)
    ids = torch.randint(1, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        decoding = Decoding(model)
        logits = [decoding.prefill(ids[:, :5])] + [decoding.step(ids[:, i]) for i in range(5, 9)]
        whole = model(input_ids=ids, use_cache=False).logits[:, 4:]
    assert torch.allclose(torch.stack(logits, dim=1), whole, atol=1e-4)
    # negative control: without the first token the logits are others
    with evaluating(model):
        assert not torch.allclose(Decoding(model).prefill(ids[:, 1:5]), whole[:, 0], atol=1e-3)


def test_models_take_turns(model, pruned):
    order = []
    handles = [
        each.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: order.append(name) if kwargs["input_ids"].shape[1] > 1 else None,
            with_kwargs=True,
        )
        for name, each in (("dense", model), ("pruned", pruned))
    ]
    try:
        compare_speed(model, pruned, batch_sizes=(1,), prompt=4, generate=2, repeats=3)
    finally:
        for handle in handles:
            handle.remove()
    # warm-up, three rounds in turns, then the rounds in which the dense model's blocks are timed
    assert order == ["dense", "pruned"] * 4 + ["dense"] * 3


def test_the_limit_is_that_of_the_share_of_blocks_and_their_share_of_the_time(model, pruned):
    rows, ratios = compare_speed(model, pruned, **SMALL)
    assert rows["model"].tolist() == ["dense"] * 2 + ["pruned"] * 2 + ["dense"] * 2 + ["pruned"] * 2
    assert len(ratios) == 4
    assert (ratios["removed"] == 0.25).all()
    assert ((ratios["block_share"] > 0) & (ratios["block_share"] <= 1)).all()
    assert ratios["limit"].to_numpy() == pytest.approx(1 / (1 - 0.25 * ratios["block_share"]))
    assert (ratios["low"] <= ratios["speedup"]).all()
    assert (ratios["speedup"] <= ratios["high"]).all()
    assert ratios["cache_ratio"].to_numpy() == pytest.approx(0.75)
    assert ratios["parameter_ratio"].to_numpy() == pytest.approx(
        parameter_bytes(pruned) / parameter_bytes(model)
    )
    halves = compare_speed(model, pruned, removed=0.5, batch_sizes=(1,), prompt=4, generate=1, repeats=1)[1]
    assert halves["limit"].to_numpy() == pytest.approx(1 / (1 - 0.5 * halves["block_share"]))


def test_seconds_become_ratios_and_shares_by_a_clock_that_is_known(model, pruned, monkeypatch):
    """A clock that counts the blocks that ran: 3 ticks each, and 8 for the rest of a pass."""
    clock = [0.0]
    handles = []
    for each in (model, pruned):
        handles.append(each.register_forward_pre_hook(lambda *_: clock.__setitem__(0, clock[0] + 8.0)))
        for block in find_blocks(each)[1]:
            handles.append(block.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 3.0)))
    room = importlib.import_module("preln.evaluate.speed")  # its name in the package is the function
    monkeypatch.setattr(room, "_now", lambda: clock[0])
    try:
        rows, ratios = compare_speed(model, pruned, **SMALL)
    finally:
        for handle in handles:
            handle.remove()
    dense = rows[(rows["model"] == "dense") & (rows["batch"] == 1)].set_index("phase")
    assert dense["seconds"]["prefill"] == 20.0
    assert dense["seconds"]["decode"] == 80.0
    assert ratios["block_share"].to_numpy() == pytest.approx(12 / 20)
    assert ratios["speedup"].to_numpy() == pytest.approx(20 / 17)
    # blocks of equal time and a rest that stays: the limit is reached exactly (SPD-AMDAHL)
    assert ratios["limit"].to_numpy() == pytest.approx(ratios["speedup"].to_numpy())
    # negative control: the share of blocks alone promises more
    assert (1 / (1 - ratios["removed"]) > ratios["limit"] + 0.1).all()


def test_the_limit_formula_and_its_ends():
    assert amdahl_limit(0.0, 0.7) == amdahl_limit(0.7, 0.0) == 1.0
    assert amdahl_limit(1.0, 0.75) == pytest.approx(4.0)
    for p, b in np.random.default_rng(0).random((20, 2)):
        assert amdahl_limit(p, b) == pytest.approx(1.0 / (1.0 - p * b))
    for p, b in [(-0.1, 0.5), (0.5, 1.1), (1.0, 1.0)]:
        with pytest.raises(InputError):
            amdahl_limit(p, b)


def test_modes_and_hooks_are_left_as_they_were(model, pruned):
    model.train()
    try:
        compare_speed(model, pruned, batch_sizes=(1,), prompt=4, generate=1, repeats=1)
        assert model.training
        assert model.model.layers[0].training
    finally:
        model.eval()
    assert not pruned.training
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in find_blocks(model)[1])


def test_bad_counts_are_refused(model, pruned):
    for bad, message in [
        ({"batch_sizes": ()}, "no batch size"),
        ({"batch_sizes": (0,)}, "batch size 0"),
        ({"prompt": 0}, "prompt 0"),
        ({"generate": 0}, "generate 0"),
        ({"repeats": 0}, "repeats 0"),
        ({"prompt": 512}, "the model has 512 positions"),
    ]:
        with pytest.raises(InputError, match=message):
            speed(model, **{**SMALL, **bad})
    with pytest.raises(InputError, match="swap the two"):
        share_removed(pruned, model)
