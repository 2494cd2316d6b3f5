import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from preln import load_model
from preln.base.errors import InputError
from preln.base.files import write_checksums
from preln.models import model_fingerprint, tiny_model, tiny_tokenizer, token_losses

pytestmark = pytest.mark.integration


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "nonsense: unknown here"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file"),
        ("tiny:nothing", "no tiny model"),
        ("tiny:llama:0", "at least one block"),
        ("tiny:llama:x", "whole number"),
    ],
)
def test_unknown_models_are_named_in_one_line(spec, message):
    with pytest.raises(InputError, match=message) as error:
        load_model(spec)
    assert "\n" not in str(error.value)


def test_a_local_folder_loads_as_it_was_saved(checkpoint):
    model, tokenizer = load_model(str(checkpoint))
    assert model_fingerprint(model) == model_fingerprint(tiny_model("llama"))
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"


def test_nan_weights_are_refused(checkpoint):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(checkpoint)
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(checkpoint))


def test_a_missing_tensor_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"disagree at num_hidden_layers \(5 against at most 4\)"):
        load_model(str(checkpoint))
    config["num_hidden_layers"] = 4
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"disagree at 'model\.layers\.2\.mlp\.up_proj"):
        load_model(str(checkpoint))


def test_a_damaged_file_and_an_empty_folder_are_refused(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(checkpoint))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(str(tmp_path / "empty"))


def test_a_foreign_gguf_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PRELN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(InputError, match="GGUF"):
        load_model(str(tmp_path / "x.gguf"))


def test_wrong_device_and_dtype_are_refused():
    with pytest.raises(InputError, match="--device nowhere"):
        load_model("tiny:llama", device="nowhere")
    with pytest.raises(InputError, match="--dtype int3"):
        load_model("tiny:llama", dtype="int3")


def test_tiny_models_repeat_themselves_and_differ_by_seed():
    first, second = tiny_model("llama", seed=1), tiny_model("llama", seed=1)
    assert model_fingerprint(first) == model_fingerprint(second)
    assert model_fingerprint(first) != model_fingerprint(tiny_model("llama", seed=2))
    gains = first.model.layers[0].input_layernorm.weight
    assert gains.std() > 0.05  # a formula that forgets the gain must be visible


def test_token_losses_equal_a_hand_written_cross_entropy_and_ignore_padding():
    model = tiny_model("gpt2")
    ids = torch.randint(3, 500, (3, 12), generator=torch.Generator().manual_seed(0))
    losses, mask = token_losses(model, ids, batch_size=2)
    assert losses.shape == mask.shape == (3, 11)
    with torch.no_grad():
        logits = model(ids).logits.double()
    for i in range(3):
        for j in range(11):
            p = torch.exp(logits[i, j] - logits[i, j].max())
            expected = -torch.log(p[ids[i, j + 1]] / p.sum())
            assert losses[i, j].item() == pytest.approx(expected.item(), abs=1e-5)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    attention = torch.cat([torch.ones_like(ids), torch.zeros(3, 4, dtype=torch.long)], dim=1)
    again, kept = token_losses(model, padded, attention)
    assert kept.sum() == 33
    assert torch.allclose(again[kept], losses.flatten(), atol=1e-5)
    assert not torch.allclose(again.mean(), losses.mean(), atol=1e-3)


@pytest.fixture
def compact(tmp_path):
    from preln.prune import prune

    folder = tmp_path / "compact"
    prune(tiny_model("llama"), ["1a", "2m"], compact=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_compact_checkpoint_loads_without_its_branches(compact):
    model, _ = load_model(str(compact), dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith(("model.layers.1.self_attn", "model.layers.2.mlp")) for name in names)
    assert not any("layers.1.input_layernorm" in name for name in names)


def change_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("preln_halves"), "names no model that is known"),
        (lambda v: v["preln_halves"].pop("model_type"), "names no model that is known"),
        (lambda v: v["preln_halves"]["blocks"].pop("1"), "disagree at 'model.layers.1"),
        (
            lambda v: v["preln_halves"]["blocks"].update({"9": {"mlp": {"gives": "zeros"}}}),
            "cannot be loaded",
        ),
        (lambda v: v["preln_halves"].update(model_type="os.system"), "names no model that is known"),
    ],
)
def test_a_compact_checkpoint_that_disagrees_with_itself_is_refused(compact, change, message):
    change_config(compact, change)
    with pytest.raises(InputError, match=message) as error:
        load_model(str(compact))
    assert "\n" not in str(error.value)


def test_a_flipped_bit_in_a_stored_model_is_named(checkpoint):
    write_checksums(checkpoint)
    load_model(str(checkpoint))
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # the last bits of a weight: finite, and of the same shape
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"model\.safetensors: was changed since it was written"):
        load_model(str(checkpoint))
    (checkpoint / "checksums.json").unlink()
    load_model(str(checkpoint))
