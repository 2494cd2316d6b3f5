from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import preln
from preln.base.errors import InputError
from preln.cli import main
from preln.models import ARCHITECTURES, load_model, tiny_model, tiny_tokenizer
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


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"llama", "gpt2", "gemma3"}))
def test_every_architecture_is_written_and_proved(tmp_path, architecture):
    """Scattered removals through the same proof; the others are in the tests of the models."""
    model, tokenizer = load_model(f"tiny:{architecture}")
    plan = plan_layers([0, 2], 4)
    small = prune(model, plan=plan)
    out = write_checkpoint(small, tokenizer, plan, tmp_path / "out")
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        torch.testing.assert_close(loaded(IDS).logits, small(IDS).logits, rtol=0, atol=1e-6)


def test_metric_layers_and_plan_agree_to_the_byte(tmp_path, capsys):
    """The same blocks named in three ways give the same weights: all count from 0."""
    common = ["prune", "tiny:llama:6", "--json"]
    ways = {
        "metric": ["--metric", "reverse", "--drop", "2"],
        "layers": ["--layers", "4-6"],
        "plan": ["--plan", str(tmp_path / "metric" / "plan.yaml")],
    }
    for name, way in ways.items():
        assert main([*common, *way, "--out", str(tmp_path / name)]) == 0
        said = capsys.readouterr().out
        assert "counted from 0: 4, 5; keeps 0, 1, 2, 3" in said
        assert json.loads(said.strip().splitlines()[-1])["drop"] == [4, 5]
    files = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ways}
    assert files["metric"] == files["layers"] == files["plan"]


def test_the_command_says_what_goes_before_it_writes(tmp_path, monkeypatch, capsys):
    said = []

    def refuse(*_, **__):
        said.append(capsys.readouterr().out)
        raise InputError("not written")

    monkeypatch.setattr(surgery, "check_checkpoint", refuse)
    assert main(["prune", "tiny:llama", "--layers", "1,3m", "--out", str(tmp_path / "out")]) == 2
    assert "counted from 0: 1; removes the MLP of 3; keeps 0, 2, 3" in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "laco"], "--drop is missing"),
        (["--method", "laco", "--layers", "1"], "chooses its blocks itself"),
        (["--method", "nonsense", "--drop", "1"], "method 'nonsense' is unknown"),
        (["--method", "laco", "--drop", "1", "--format", "compact"], "replacements are plain"),
        (["--layers", "1", "--format", "compact"], "for halves"),
        (["--layers", "1", "--set", "a=1"], "removal has no settings"),
        (["--method", "laco", "--drop", "1", "--set", "a=1"], "--set a=1"),
        (["--layers", "1a,1"], "goes as a whole"),
    ],
)
def test_bad_commands_write_nothing(tmp_path, capsys, arguments, message):
    assert main(["prune", "tiny:llama", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_and_a_compact_half_from_the_command_line(tmp_path, capsys):
    data = ["--sequences", "4", "--length", "16"]
    first = [
        "--method",
        "sliding_merge",
        "--drop",
        "1",
        "--set",
        "step=0.1",
        "--out",
        str(tmp_path / "merged"),
    ]
    assert main(["prune", "tiny:llama", *data, *first]) == 0
    assert "by sliding_merge (" in capsys.readouterr().out
    stored = ["--plan", str(tmp_path / "merged" / "plan.yaml"), "--out", str(tmp_path / "again")]
    assert main(["prune", "tiny:llama", *data, *stored]) == 0
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("merged", "again"))
    assert one == two
    half = ["--layers", "2a", "--format", "compact", "--out", str(tmp_path / "half")]
    assert main(["prune", "tiny:llama", *half]) == 0
    assert load_model(str(tmp_path / "half"))[0].config.preln_halves["blocks"].keys() == {"2"}


def test_halves_chosen_by_a_metric(tmp_path):
    out = tmp_path / "out"
    data = ["--sequences", "2", "--length", "16"]
    way = ["--metric", "llm_drop_attention", "--drop", "2", "--protect", "uidl"]
    assert main(["prune", "tiny:llama", *data, *way, "--out", str(out)]) == 0
    plan = read_plan(out / "plan.yaml")
    assert plan.metric == "llm_drop_attention" and len(plan.drop_attention) == 2 and plan.tokens
    assert not plan.drop and not plan.drop_mlp and 3 not in plan.drop_attention
    weights = load_file(out / "model.safetensors")
    zero = {i for i in range(4) if not weights[f"model.layers.{i}.self_attn.o_proj.weight"].any()}
    assert zero == set(plan.drop_attention)
    many = [
        "--metric",
        "llm_drop_attention",
        "--drop",
        "4",
        "--protect",
        "uidl",
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(["prune", "tiny:llama", *data, *many]) == 2


def test_a_sharded_source(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "source", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    model, tokenizer = load_model(str(tmp_path / "source"))
    plan = plan_layers([1, 2], 4)
    out = write_checkpoint(prune(model, plan=plan), tokenizer, plan, tmp_path / "out")
    with torch.no_grad():
        expected = prune(tiny_model("llama"), drop=[1, 2])(IDS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore")  # of the libraries, about kernels for the CPU
def test_a_quantised_source_loses_blocks_but_no_halves(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model("llama").save_pretrained(tmp_path / "source")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=settings, dtype=torch.float32
    )
    whole.save_pretrained(tmp_path / "quantised")
    tiny_tokenizer().save_pretrained(tmp_path / "quantised")
    model, tokenizer = load_model(str(tmp_path / "quantised"))
    plan = plan_layers([1, 2], 4)
    small = prune(model, plan=plan)
    out = write_checkpoint(small, tokenizer, plan, tmp_path / "out")
    again, _ = load_model(str(out))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, small(IDS).logits, rtol=0, atol=1e-6)
    assert any(p.dtype == torch.uint8 for p in again.parameters())  # still quantised
    with pytest.raises(InputError, match="quantised"):
        prune(model, ["1a"])
    with pytest.raises(InputError, match="quantised"):
        preln.prune.replace_blocks(model, IDS, "laco", drop=1)


def test_a_kill_while_it_is_proved_leaves_only_a_hidden_folder(tmp_path):
    """The process dies as if the machine did, in the middle of the reload."""
    code = f"""
import os
from preln.prune import surgery
from preln.cli import main
surgery.check_checkpoint = lambda folder, model: os.kill(os.getpid(), 9)
main(["prune", "tiny:llama", "--layers", "1", "--out", {str(tmp_path / "out")!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ.copy(), capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr.decode()
    left = [p.name for p in tmp_path.iterdir() if p.name != ".out.lock"]  # which the next run takes over
    assert len(left) == 1 and left[0].startswith(".out.") and left[0].endswith(".part")
