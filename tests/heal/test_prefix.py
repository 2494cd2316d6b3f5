from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from preln.base.errors import InputError
from preln.heal import train
from preln.heal.prefix import states as module
from preln.heal.prefix.cache import Cache
from preln.heal.prefix.states import build_prefix, prefix_bytes
from preln.heal.preparing.prepare import prepare
from preln.heal.rows.examples import as_examples
from preln.heal.training.student import Student
from preln.models import find_blocks, tiny_model
from preln.models.tiny import ARCHITECTURES

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")


def stream(model, ids):
    """x[0] … x[L] by hooks of its own."""
    seen = []
    blocks = find_blocks(model)[1]

    def first(_, args, kwargs):
        seen.append((*args, *kwargs.values())[0])

    def last(_, __, output):
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [block.register_forward_pre_hook(first, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(last))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def build(model, tokens, depths, folder, **options):
    examples = as_examples(tokens)
    return build_prefix(model, examples, depths, folder, identity={"model": "m"}, **options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bloom", "phi3"])
def test_the_file_holds_the_stream(architecture, tmp_path):
    model, tokens = tiny_model(architecture, blocks=4), random_tokens(6, 10)
    states = stream(model, tokens)
    found = build(model, tokens, [4, 1, 3], tmp_path, batch_size=4)
    assert found.depths == (1, 3, 4)
    stored = load_file(found.path)
    assert sorted(stored) == ["x1", "x3", "x4"]
    for depth in found.depths:
        torch.testing.assert_close(stored[f"x{depth}"], states[depth], rtol=1e-5, atol=1e-5)
        some = found.states(depth, [5, 0], device=CPU, dtype=torch.float64)
        assert torch.equal(some, stored[f"x{depth}"][[5, 0]].double())
    assert not torch.allclose(stored["x1"], states[2], atol=1e-2)  # negative control
    assert found.path.stat().st_size > prefix_bytes(as_examples(tokens), 64, [1, 3, 4], "float32")
    assert os.listdir(tmp_path).count("prefix.safetensors") == 1 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(("recipe", "depth"), [("head", 4), ("partial-1", 3), ("partial-3", 1)])
def test_cached_training_is_uncached_training_bit_for_bit_row_by_row(recipe, depth, tmp_path):
    """HEAL-PREFIX: with one row a pass the products have the same shapes, so not even rounding differs."""
    model = tiny_model("llama")
    plan = settings(steps=8, eval_every=4, gradient_accumulation=4)
    data = {"validation": random_tokens(5, seed=1), "settings": plan, "recipe": recipe}
    plain = train(model, random_tokens(), **data)
    cached = train(model, random_tokens(), **data, cache=Cache(tmp_path, mode="on"))
    assert cached.manifest["cache"]["depth"] == depth and plain.manifest["cache"] is None
    for name, tensor in plain.trained.items():
        assert torch.equal(tensor, cached.trained[name]), name
    drop = ["seconds"]
    assert plain.history.drop(columns=drop).equals(cached.history.drop(columns=drop))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "olmo2", "qwen3", "opt"])
def test_cached_training_in_larger_portions_differs_by_rounding(architecture, tmp_path):
    model, plan = tiny_model(architecture).double(), settings(steps=4)
    plain = train(model, random_tokens(), recipe="partial-1", settings=plan)
    cached = train(
        model, random_tokens(), recipe="partial-1", settings=plan, cache=Cache(tmp_path, mode="on")
    )
    moved = 0.0
    fresh = model.state_dict()
    for name, tensor in plain.trained.items():
        torch.testing.assert_close(tensor, cached.trained[name], rtol=0, atol=2e-5)
        if name in fresh:
            moved = max(moved, float((tensor - fresh[name]).abs().max()))
    assert moved > 1e-3  # negative control: training moved the weights far beyond that


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "bert"])
def test_the_end_behind_a_stored_state_is_the_whole_model(architecture):
    model = tiny_model(architecture, blocks=3)
    examples, prepared = as_examples(random_tokens(2, 9)), prepare(model, "partial-1")
    prepared.model.eval()
    states = stream(prepared.model, examples.input_ids)
    with torch.no_grad():
        whole = Student(prepared).states(examples)
        for start in (1, 2, 3):
            behind = Student(prepared, start=start)
            found = behind.states(examples, states[start])
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
            if start < 3:  # negative control: the stored state is what counts
                other = behind.states(examples, states[start] + torch.randn_like(whole))
                assert not torch.allclose(other, whole, atol=1e-2)


def test_a_narrow_cache_is_near_and_not_equal(tmp_path):
    model, plan = tiny_model("llama"), settings(steps=4)
    plain = train(model, random_tokens(), recipe="partial-1", settings=plan)
    rounded = train(
        model,
        random_tokens(),
        recipe="partial-1",
        settings=plan,
        cache=Cache(tmp_path, mode="on", dtype="bfloat16"),
    )
    gaps = [float((t - rounded.trained[n]).abs().max()) for n, t in plain.trained.items()]
    assert 0 < max(gaps) < 0.02
    assert rounded.manifest["numerics"]["cache"] == "bfloat16"


def test_the_prefix_runs_once(tmp_path, monkeypatch):
    model, filled, ran = tiny_model("llama"), [], []
    fill = module._fill
    monkeypatch.setattr(module, "_fill", lambda *args: (filled.extend(args[-1]), fill(*args)))
    for index, block in enumerate(find_blocks(model)[1]):  # the copy that trains keeps these hooks
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    cache, counts = Cache(tmp_path, mode="on"), []
    for steps in (6, 6, 9):
        ran.clear()
        plan = settings(steps=steps, checkpoint_every=None)
        train(model, random_tokens(12), recipe="partial-1", settings=plan, cache=cache)
        counts.append([ran.count(index) for index in range(4)])
    assert filled == list(range(12))
    assert counts[2][:3] == counts[1][:3]  # more steps run no frozen block
    assert counts[2][3] - counts[1][3] == 3  # but the one that trains, once a step


def test_auto_stores_what_comes_again(tmp_path):
    model, data = tiny_model("llama"), random_tokens(12)
    cache = Cache(tmp_path)
    once = train(model, data, recipe="partial-1", settings=settings(steps=3), cache=cache)
    assert once.manifest["cache"] is None  # 3 steps of 4 rows: every row comes once
    twice = train(model, data, recipe="partial-1", settings=settings(steps=4), cache=cache)
    assert twice.manifest["cache"]["depth"] == 3
    lora = train(model, data, recipe="lora", settings=settings(steps=4), cache=cache)
    assert lora.manifest["cache"] is None  # its adapters sit in every block
    tight = Cache(tmp_path / "x", budget=100)
    assert (
        train(model, data, recipe="head", settings=settings(steps=4), cache=tight).manifest["cache"] is None
    )
    with pytest.raises(InputError, match="the cache may take"):
        tight = Cache(tmp_path / "x", mode="on", budget=100)
        train(model, data, recipe="head", settings=settings(steps=4), cache=tight)


def test_another_runs_file_and_a_flipped_bit_are_refused(tmp_path):
    model, tokens = tiny_model("llama", blocks=2), random_tokens(4, 8)
    path = build(model, tokens, [1], tmp_path).path
    with pytest.raises(InputError, match="another model, data or form"):
        build(model, tokens, [1], tmp_path, dtype="bfloat16")
    with pytest.raises(InputError, match="another model, data or form"):
        build(model, tokens, [2], tmp_path)
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(InputError, match="SHA-256"):
        build(model, tokens, [1], tmp_path)


def test_states_that_are_not_finite_name_their_row(tmp_path):
    model = tiny_model("llama", blocks=2)
    tokens = random_tokens(4, 8)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(tokens[2, 0])] = 1e6
    with pytest.raises(InputError, match=r"row \d: x\[1\] is not finite in float16"):
        build(model, tokens, [1], tmp_path, dtype="float16")
    build(model, tokens, [1], tmp_path / "wide")


@pytest.mark.parametrize(("depths", "message"), [([0], "from 1 to 2"), ([3], "from 1 to 2"), ([], "from 1")])
def test_depths_that_are_not_there_are_refused(depths, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build(tiny_model("llama", blocks=2), random_tokens(2, 4), depths, tmp_path)


SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from preln.heal.prefix import states as prefix
from preln.heal.rows.examples import as_examples
from preln.models import tiny_model
from tests.heal.helpers import random_tokens
prefix._FLUSH = 4
fill = prefix._fill
def slow(*args):
    fill(*args)
    time.sleep(float(sys.argv[2]))
prefix._fill = slow
examples = as_examples(random_tokens(40, 8))
model = tiny_model("llama", blocks=2)
print("ready", flush=True)
prefix.build_prefix(model, examples, [1, 2], sys.argv[1], identity={"model": "m"}, batch_size=2)
"""


def test_a_build_that_was_killed_goes_on_where_it_was(tmp_path):
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")]
    first = subprocess.Popen([*words, "0.1"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "ready\n"
    progress = tmp_path / "killed" / "prefix.progress.json"
    for _ in range(600):
        if progress.exists() and json.loads(progress.read_text())["rows"] >= 8:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert not (tmp_path / "killed" / "prefix.safetensors").exists()
    done = json.loads(progress.read_text())["rows"]
    assert 0 < done < 40
    seen = []
    fill = module._fill

    def noted(model, blocks, part, maps, rows):
        seen.extend(rows)
        fill(model, blocks, part, maps, rows)

    module._fill = noted
    try:
        tokens = random_tokens(40, 8)
        model = tiny_model("llama", blocks=2)
        found = build(model, tokens, [1, 2], tmp_path / "killed", batch_size=2)
    finally:
        module._fill = fill
    assert seen == list(range(done, 40))
    whole = build(model, tokens, [1, 2], tmp_path / "whole", batch_size=2)
    one, other = load_file(found.path), load_file(whole.path)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert sorted(os.listdir(tmp_path / "killed")) == ["prefix.json", "prefix.safetensors"]
