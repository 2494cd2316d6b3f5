"""Sharded blocks: curve, gradient norms and checkpoints of one process, at a part of its memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import preln.heal.training.loop as loop_module
from preln.base.errors import InputError
from preln.heal import as_examples, get_recipe, override, train
from preln.heal.preparing.prepare import prepare
from preln.heal.preparing.sharding import clip_gradients, part_groups, wants_shards, without_weights
from preln.heal.training.step import Stepper
from preln.heal.training.workers import Workers, own_device
from preln.models import model_fingerprint, tiny_model

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration
# name: architecture, recipe, settings; 5 portions of a batch leave the second process an idle turn, and
# matrices of rank 3 are cut into parts of 2 rows and 1
CASES = {
    "tail": ("llama", "partial-2", {"batch_size": 5, "gradient_accumulation": 5}),
    "head": ("llama", "head", {}),
    "full": ("gpt2", "full", {"gradient_accumulation": 2, "weight_decay": 0.1}),
    "lora": ("llama", "lora", {"gradient_accumulation": 2, "select": "best"}),
    "checkpointed": (
        "llama",
        "full",
        {"steps": 2, "gradient_checkpointing": True, "gradient_accumulation": 2},
    ),
}
SCRIPT = """
import json, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import preln.heal.preparing.sharding as sharding
from tests.heal.test_sharding import CASES, Stopped, measured, stop_at, tight
from preln.heal import Cache, heal_model
from preln.heal.training.step import Stepper
from preln.models import tiny_model, tiny_tokenizer
folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
found = {name: measured(name, shard="on") for name in CASES}
found["cached"] = measured("tail", shard="on", cache=Cache(folder / "prefix", mode="on"))
passes = Stepper._gradients
if rank == 1:
    Stepper._gradients = tight(passes)
found["whole"] = measured("checkpointed", shard="off")
Stepper._gradients = passes
try:
    measured("lora", shard="on", directory=folder / "two", on_row=stop_at(5))
except Stopped:
    pass
found["continued"] = measured("lora", shard="on", directory=folder / "one")
right = sharding.sum_gradients
sharding.sum_gradients = lambda block: block.set_force_sum_reduction_for_comms(True)  # FSDP's own mean
found["averaged"] = measured("full", shard="on")
sharding.sum_gradients = right
rows = [{"text": "words of several kinds " * count} for count in (1, 2, 3, 4)]  # packed
result = heal_model(tiny_model("llama"), rows, "full", steps=2, out=folder / "out", shard="on",
                    tokenizer=tiny_tokenizer())
found["saved"] = {"meta": next(result.model.parameters()).is_meta, "trained": len(result.trained)}
(folder / f"rank-{rank}.json").write_text(json.dumps(found))
"""


class Stopped(Exception):
    pass


def stop_at(step: int):
    def stop(row: dict) -> None:
        if row["split"] == "train" and row["step"] == step:
            raise Stopped

    return stop


def tight(passes):
    """Passes for which memory holds one row."""

    def limited(self, *batch):
        if self.portion > 1:
            raise torch.OutOfMemoryError("memory is full")
        return passes(self, *batch)

    return limited


def measured(name: str, **options: object) -> dict:
    """A case's losses and gradient norms, the sum of its weights, and the bytes that this process held."""
    architecture, recipe, changed = CASES[name]
    chosen = override(get_recipe(recipe), rank=3) if recipe == "lora" else recipe
    norms = []
    clip = loop_module.clip_gradients

    def noted(parameters, most):
        norms.append(clip(parameters, most))
        return norms[-1]

    loop_module.clip_gradients = noted
    try:
        result = train(
            tiny_model(architecture), random_tokens(), validation=random_tokens(5, seed=1), recipe=chosen,
            settings=settings(**{"eval_every": 3, "max_grad_norm": 0.5, **changed}), **options,
        )  # fmt: skip
    finally:
        loop_module.clip_gradients = clip
    weights = {} if next(result.model.parameters()).is_meta else result.model.state_dict()
    return {
        "loss": result.history["loss"].tolist(),
        "norms": norms,
        "sum": sum(float(t.double().abs().sum()) for t in weights.values()),
        "held": result.manifest["held_bytes"],
        "sharded": result.manifest["sharded"],
        "portion": result.manifest["portion"],
        "parameters": result.manifest["total_parameters"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found; one process had been stopped in ``one`` before."""
    root = tmp_path_factory.mktemp("shards")
    with pytest.raises(Stopped):
        measured("lora", directory=root / "one", on_row=stop_at(5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        env = dict(os.environ) | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", SCRIPT, str(root)]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    said = [process.communicate(timeout=400)[1].decode()[-4000:] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    return root


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> dict[str, dict]:
    return {name: measured(name) for name in CASES}


def close(a: list[float], b: list[float], tolerance: float = 1e-4) -> bool:
    return len(a) == len(b) and torch.allclose(torch.tensor(a), torch.tensor(b), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", [*CASES, "cached"])
def test_the_curve_and_the_norms_are_those_of_one_process(name, one, two):
    alone, first = one["tail" if name == "cached" else name], two[0][name]
    assert first["sharded"] and not alone["sharded"]
    assert first["loss"] == two[1][name]["loss"]
    assert close(first["loss"], alone["loss"])
    assert close(first["norms"], alone["norms"], 1e-3)
    assert max(alone["norms"]) > 0.5, "nothing was clipped: the check is empty"
    assert max(alone["loss"]) - min(alone["loss"]) > 0.01
    assert first["sum"] == pytest.approx(alone["sum"], rel=1e-5)
    assert first["parameters"] == alone["parameters"]


def test_the_mean_of_the_gradients_in_place_of_their_sum_is_noticed(one, two):
    """Adam hardly minds the scale of a gradient, so it is the norm that tells."""
    assert not close(two[0]["averaged"]["norms"], one["full"]["norms"], 1e-2)


@pytest.mark.parametrize("name", ["tail", "full"])
def test_each_process_holds_less(name, one, two):
    alone = one[name]["held"]
    outside = outside_bytes(name)
    for rank in two:
        # half of the blocks, with their moments, and all of what stays whole; some counters beside
        assert rank[name]["held"] < 0.75 * alone
        assert rank[name]["held"] == pytest.approx(outside + (alone - outside) / 2, rel=0.02)
    whole = one["checkpointed"]["held"]
    assert two[0]["whole"]["held"] == whole == two[1]["whole"]["held"]  # not without shards


def outside_bytes(name: str) -> int:
    """Weights outside the blocks, with two moments of those that train."""
    model = tiny_model(CASES[name][0])
    outside = {n: p for n, p in model.named_parameters() if ".layers." not in n and ".h." not in n}
    trains = [n for n in outside if CASES[name][1] == "full" or "embed" not in n]
    return 4 * sum(p.numel() * (3 if n in trains else 1) for n, p in outside.items())


def test_a_checkpoint_is_continued_by_another_number_of_processes(folder, one, two):
    """Two sharded processes go on where one was stopped, and the other way round."""
    assert sorted(f.name for f in (folder / "two").iterdir()) == ["step-00000004"]
    back = measured("lora", directory=folder / "two")
    for found in (two[0]["continued"], back):
        assert close(found["loss"], one["lora"]["loss"])
        assert len(found["norms"]) == 2 < len(one["lora"]["norms"])  # the last two steps only
        assert found["sum"] == pytest.approx(one["lora"]["sum"], rel=1e-5)


def test_the_saved_model_is_a_plain_one_and_process_0_has_it(folder, two):
    loaded, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert not (folder / "out.resume").exists()
    assert not two[0]["saved"]["meta"] and two[0]["saved"]["trained"] > 0
    assert two[1]["saved"] == {"meta": True, "trained": 0}
    start = tiny_model("llama")
    gap = (loaded.model.layers[0].mlp.up_proj.weight - start.model.layers[0].mlp.up_proj.weight).abs().max()
    assert gap > 1e-6, "nothing was trained: the check is empty"


def test_where_one_process_runs_out_of_memory_all_take_smaller_portions(one, two):
    assert [rank["whole"]["portion"] for rank in two] == [1, 1] and one["checkpointed"]["portion"] == 2
    assert not two[0]["whole"]["sharded"]
    assert close(two[0]["whole"]["loss"], one["checkpointed"]["loss"])
    assert close(two[0]["whole"]["norms"], one["checkpointed"]["norms"], 1e-3)


def test_sharded_blocks_cannot_begin_a_batch_anew(monkeypatch):
    passes = Stepper(prepare(tiny_model("llama"), "head"), settings(batch_size=4))
    passes.prepared.sharded = True
    monkeypatch.setattr(Stepper, "_gradients", tight(Stepper._gradients))
    with pytest.raises(InputError, match="does not hold 4 rows in one pass: raise gradient_accumulation"):
        passes.gradients(as_examples(random_tokens(4)), range(4), 0)


def several(count: int = 2) -> Workers:
    workers = Workers(torch.device("cpu"))
    workers.count = count
    return workers


@pytest.mark.parametrize(
    ("recipe", "changed", "count", "message"),
    [
        ("partial-1", {}, 1, "this is one process"),
        ("qlora", {}, 2, "recipe qlora: 4-bit weights cannot be sharded"),
        ("lora", {"optimizer": "paged_adamw_8bit"}, 2, "optimizer=paged_adamw_8bit"),
        ("seam", {}, 2, "recipe seam: its passes end at a cut"),
    ],
)
def test_what_cannot_be_sharded_is_said_or_left_alone(recipe, changed, count, message):
    told = (tiny_model("llama"), get_recipe(recipe), settings(**changed), several(count), torch.device("cpu"))
    with pytest.raises(InputError, match=message) as refusal:
        wants_shards("on", *told)
    assert "\n" not in str(refusal.value)
    assert not wants_shards("auto", *told) and not wants_shards("off", *told)


def test_one_process_is_refused_before_anything_happens(tmp_path):
    with pytest.raises(InputError, match="torchrun, or use off"):
        train(tiny_model("llama"), random_tokens(), settings=settings(), shard="on", directory=tmp_path / "c")
    with pytest.raises(InputError, match="choose one of auto, on, off"):
        train(tiny_model("llama"), random_tokens(), settings=settings(), shard="yes")
    assert not (tmp_path / "c").exists()


def test_auto_shards_what_a_gpu_would_not_hold(monkeypatch):
    model, full = tiny_model("llama"), get_recipe("full")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    told = (model, full, settings(), several(), torch.device("cuda"))
    for memory, wanted in ((5.1 * weights, False), (4.9 * weights, True)):  # 4 times the weights in 0.8 of it
        properties = types.SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert wants_shards("auto", *told) == wanted
        assert not wants_shards("auto", model, get_recipe("head"), *told[2:])  # trains too little


def test_whole_tensors_are_clipped_by_torch_itself():
    weights = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    optimizer = torch.optim.AdamW(weights)
    part_groups(optimizer)
    assert [group["params"] for group in optimizer.param_groups] == [weights]
    assert clip_gradients(weights, None) == pytest.approx(4.0 * 3**0.5)
    assert clip_gradients(weights, 1.0) == pytest.approx(4.0 * 3**0.5)
    assert clip_gradients(weights, None) == pytest.approx(1.0, rel=1e-5)


def test_a_copy_without_weights_leaves_the_model():
    model = tiny_model("gpt2")
    before = model_fingerprint(model)
    empty = without_weights(model)
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert model_fingerprint(model) == before


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_turns_are_equally_many_in_every_process():
    for count in (1, 2, 3, 4):
        for items in (list(range(n)) for n in range(8)):
            shares = []
            for rank in range(count):
                workers = several(count)
                workers.rank = rank
                shares.append(workers.turns(items))
            assert len({len(share) for share in shares}) == 1
            assert sorted(i for share in shares for i in share if i is not None) == items
