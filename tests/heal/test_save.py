from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import preln
from preln.base.errors import InputError
from preln.base.files import sha256_file
from preln.heal import HealResult, save_healed, train
from preln.models import drop_blocks, tiny_model, tiny_tokenizer

from .helpers import random_tokens, settings

pytestmark = pytest.mark.integration


def healed(architecture: str, recipe: str) -> tuple[torch.nn.Module, HealResult]:
    small = drop_blocks(tiny_model(architecture), [1])
    result = train(
        small, random_tokens(), validation=random_tokens(seed=1), recipe=recipe, settings=settings()
    )
    return small, result


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(2, seed=3)).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # a head of its own, and a shared one
@pytest.mark.parametrize("recipe", ["head", "partial-2", "lora"])
def test_plain_transformers_loads_the_same_model(tmp_path: Path, architecture: str, recipe: str) -> None:
    _, result = healed(architecture, recipe)
    save_healed(result, tiny_tokenizer(), tmp_path / "m")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(result.model))
    assert loaded.state_dict().keys() == result.model.state_dict().keys()
    tied = architecture == "gpt2" and recipe == "lora"
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    prompt = random_tokens(1, 4)
    texts = [
        m.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (loaded, result.model)
    ]
    assert torch.equal(*texts)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "m")("ab")["input_ids"]
        == tiny_tokenizer()("ab")["input_ids"]
    )


def test_plain_peft_loads_the_adapter(tmp_path: Path) -> None:
    small, result = healed("llama", "lora")
    before = logits(small)
    save_healed(result, None, tmp_path / "a", adapter=True)
    assert not (tmp_path / "a" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(small, tmp_path / "a").eval()
    torch.testing.assert_close(logits(loaded), logits(result.model), rtol=1e-4, atol=1e-5)
    assert (before - logits(result.model)).abs().max() > 1e-2, "the adapter does nothing: the check is empty"
    assert not any(p.requires_grad for p in loaded.parameters())


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    _, result = healed("gpt2", "partial-1")
    out = save_healed(result, tiny_tokenizer(), tmp_path / "m")
    pd.testing.assert_frame_equal(
        pd.read_parquet(out / "training.parquet"), result.history, check_dtype=False
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == {f.name for f in out.iterdir()} - {"manifest.json", "checksums.json"}
    assert all(sha256_file(out / name) == digest for name, digest in manifest["files"].items())
    assert manifest["recipe"]["name"] == "partial-1"
    assert manifest["head_untied"]
    card = (out / "README.md").read_text()
    for part in (
        "`partial-1`", "cloned", manifest["data"]["train"], f"{manifest['loss_before']:.4f}",
        f"{manifest['loss_after']:.4f}", f"{manifest['trainable_parameters']:,}",
    ):  # fmt: skip
        assert part in card


def test_nothing_half_written_and_nothing_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, result = healed("llama", "head")
    with pytest.raises(InputError, match="makes no adapter"):
        save_healed(result, None, tmp_path / "m", adapter=True)
    with monkeypatch.context() as patch:
        patch.setattr("preln.heal.save.write_parquet", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_healed(result, None, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="not empty"):
        save_healed(result, None, tmp_path / "m")
    assert [f.name for f in (tmp_path / "m").iterdir()] == ["mine.txt"]


def test_the_verb_writes_a_folder_and_leaves_no_checkpoints(tmp_path: Path) -> None:
    model = tiny_model("llama")
    out = tmp_path / "m"
    healed_model = preln.heal(model, random_tokens(), recipe="lora", steps=3, checkpoint_every=1, out=out)
    assert [f.name for f in tmp_path.iterdir()] == ["m"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(healed_model))
    with pytest.raises(InputError, match="not an empty folder"):
        preln.heal(model, random_tokens(), recipe="lora", steps=3, out=out)
    with pytest.raises(InputError, match="makes no adapter"):
        preln.heal(model, random_tokens(), recipe="head", steps=3, out=tmp_path / "n", adapter=True)
    with pytest.raises(InputError, match="not finite"):
        preln.heal(
            model, random_tokens(), recipe="head", steps=3, learning_rate=1e30, warmup_steps=0,
            max_grad_norm=1e30, checkpoint_every=1, out=tmp_path / "n",
        )  # fmt: skip
    assert [f.name for f in tmp_path.iterdir()] == ["m"], "a diverged run left something behind"
