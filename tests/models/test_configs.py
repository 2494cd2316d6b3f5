"""Configurations without weights: the built-in table against published counts, and where they come from."""

import io
import json
import math

import pytest

from preln.base.errors import InputError
from preln.heal.preparing.layout import trainable_parameters
from preln.models import drop_blocks, tiny_model
from preln.models.configs import meta_model, read_config, table

pytestmark = pytest.mark.integration
OFFICIAL = "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def by_hand(c):
    """Parameters from the published numbers alone, without a line of transformers."""
    d, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    size = c.get("head_dim", d // heads)
    kv = c["num_key_value_heads"] * size
    biases = heads * size + 2 * kv if c["model_type"] == "qwen2" else 0
    norms = 4 if c["model_type"] == "gemma2" else 2
    block = 2 * d * heads * size + 2 * d * kv + biases + 3 * d * inner + norms * d
    tables = 1 if c["tie_word_embeddings"] else 2
    return tables * c["vocab_size"] * d + c["num_hidden_layers"] * block + d


@pytest.mark.parametrize("name", sorted(table()))
def test_the_table_has_the_published_number_of_parameters(name):
    entry = table()[name]
    model = meta_model(read_config(name).config, "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]
    assert by_hand(entry["config"]) == entry["parameters"]
    assert all(p.is_meta for p in model.parameters())
    assert entry["source"]


def test_a_wrong_width_would_not_pass():
    config = dict(table()[OFFICIAL]["config"]) | {"intermediate_size": 14335}
    assert by_hand(config) != table()[OFFICIAL]["parameters"]


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [("lora", 15.73), ("head", 525.34), ("partial-1", 743.45), ("partial-2", 961.56), ("partial-3", 1179.68)],
)
def test_trainable_parameters_of_the_papers_model_are_the_published_ones(recipe, millions):
    small = drop_blocks(meta_model(read_config(OFFICIAL).config), range(24, 32))
    assert math.isclose(trainable_parameters(small, recipe) / 1e6, millions, abs_tol=0.005)


def test_a_folder_comes_before_the_table(tmp_path):
    tiny_model("llama", blocks=3).config.save_pretrained(tmp_path)
    found = read_config(str(tmp_path))
    assert (found.source, found.config.num_hidden_layers) == ("folder", 3)
    assert read_config("tiny:gpt2:5").config.num_hidden_layers == 5


@pytest.mark.real
def test_the_packaged_models_entry_has_the_shapes_of_its_own_file(smollm2):
    for key, value in table()["smollm2-135m"]["config"].items():
        assert getattr(smollm2[0].config, key) == pytest.approx(value)
    assert sum(p.numel() for p in smollm2[0].parameters()) == table()["smollm2-135m"]["parameters"]


def test_a_packaged_model_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PRELN_CACHE", str(tmp_path))
    found = read_config("smollm2-135m")
    assert (found.source, found.config.hidden_size) == ("table", 576)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def online(monkeypatch):
    """A hub that answers, or refuses, as its text says; what was asked for is noted."""
    asked = []

    def answer(text):
        def urlopen(request, timeout):
            asked.append((request.full_url, timeout))
            if text is None:
                raise OSError("401")
            return io.BytesIO(text.encode())

        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        return asked

    return answer


def test_the_hub_comes_before_the_table_where_it_answers(online):
    asked = online(json.dumps(tiny_model("llama", blocks=3).config.to_dict()))
    found = read_config(OFFICIAL)
    assert (found.source, found.config.num_hidden_layers) == ("hub", 3)
    assert asked[0][0].endswith(f"{OFFICIAL}/resolve/main/config.json") and asked[0][1] <= 10


def test_a_hub_that_refuses_leaves_the_table(online):
    asked = online(None)
    assert read_config(OFFICIAL).source == "table"
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nobody/nothing-7b", "no configuration.*meta-llama/Llama-3.1-8B-Instruct"),
        ("../no/such/place", "no hub id"),
        ("missing.gguf", "no such file"),
        ("tiny:llama:x", "whole number"),
    ],
)
def test_what_is_unknown_is_refused_in_one_line(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        read_config(spec)
    assert "\n" not in str(caught.value)


def test_broken_configurations_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(InputError, match="encoder-decoder"):
        read_config(str(tmp_path))
