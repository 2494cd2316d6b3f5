from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import preln
from preln.base.errors import InputError
from preln.models import load_model, tiny_model
from preln.prune import plan_layers, prune, read_plan, surgery, write_checkpoint

pytestmark = pytest.mark.integration
IDS = torch.randint(1, 512, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("drop", [[3], [0], [1, 2], [0, 2, 3]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_plain_transformers_loads_the_checkpoint(tmp_path, architecture, drop):
    model, tokenizer = load_model(f"tiny:{architecture}")
    plan = plan_layers(drop, 4, model=f"tiny:{architecture}")
    small = preln.prune(model, plan=plan)
    out = write_checkpoint(small, tokenizer, plan, tmp_path / "out", licence="Apache-2.0")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.num_hidden_layers == 4 - len(drop)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, small(IDS).logits)
    text = AutoTokenizer.from_pretrained(out)("text", return_tensors="pt")
    assert loaded.generate(**text, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] > 4
    assert read_plan(out / "plan.yaml") == plan
    card = (out / "README.md").read_text()
    assert ", ".join(map(str, drop)) in card and "Apache-2.0" in card and "counted from 0" in card
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_by_blocks_and_by_plan_agree_and_the_model_is_untouched():
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    by_blocks, by_plan = prune(model, drop=[2, 1]), prune(model, plan=plan_layers([1, 2], 4))
    with torch.no_grad():
        assert torch.equal(by_blocks(IDS).logits, by_plan(IDS).logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_requests():
    model = tiny_model("llama")
    for keywords in ({}, {"drop": [1], "plan": plan_layers([1], 4)}):
        with pytest.raises(InputError, match="either"):
            prune(model, **keywords)
    with pytest.raises(InputError, match="made for 5"):
        prune(model, plan=plan_layers([1], 5))
    with pytest.raises(InputError, match="out of range"):
        prune(model, drop=[4])


def corrupt_weights(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "mlp" in n and n.endswith("weight"))
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, file, metadata={"format": "pt"})


def lose_a_tensor(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(n for n in tensors if "mlp" in n and n.endswith("weight")))
    save_file(tensors, file, metadata={"format": "pt"})


def wrong_depth(folder):
    config = json.loads((folder / "config.json").read_text())
    key = "num_hidden_layers" if "num_hidden_layers" in config else "n_layer"
    config[key] = 2
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 100)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("damage", [corrupt_weights, lose_a_tensor, wrong_depth, truncate])
def test_a_corrupted_checkpoint_never_appears(tmp_path, monkeypatch, architecture, damage):
    model, plan = tiny_model(architecture), plan_layers([1], 4)
    small = prune(model, plan=plan)
    honest = surgery.check_checkpoint
    monkeypatch.setattr(surgery, "check_checkpoint", lambda folder, m: (damage(folder), honest(folder, m)))
    with pytest.raises(InputError, match="checkpoint") as error:
        write_checkpoint(small, None, plan, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_cache_indices_are_caught():
    """Blocks that keep their former indices share or skip cache entries: generation must be seen to break."""
    model = prune(tiny_model("llama"), drop=[1])
    for block in model.model.layers:
        block.self_attn.layer_idx = 0
    with pytest.raises(InputError, match=r"cache"):
        surgery._check_cache(model, IDS)


def test_the_plan_must_fit_the_model(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="leaves 3 blocks"):
        write_checkpoint(model, None, plan_layers([1], 4), tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_checkpoint(prune(model, drop=[1]), None, plan_layers([1], 4), tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"
