"""Groups of parameters, and the shape statistics at their edges."""

from __future__ import annotations

import math

import pytest
import torch

from preln.base.errors import InputError
from preln.models import ARCHITECTURES, anatomy, tiny_model
from preln.probe import probe, probe_tables
from preln.probe.gradients import MAX_UNITS, units
from preln.probe.groups import group_of, parameter_groups
from preln.probe.stream import effective_rank, largest_shares

KNOWN = {"q", "k", "v", "o", "qkv", "gate", "up", "down", "gate_up", "router", "norms", "final_norm", "head"}


def ids(n=4, t=7):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_parameter_of_a_block_is_in_one_known_group(architecture):
    found = anatomy(tiny_model(architecture, blocks=2))
    groups = parameter_groups(found)
    for layer, block in enumerate(found.blocks):
        members = [p for at, *_, ps in groups if at == layer for p in ps]
        assert len(members) == len({id(p) for p in members}) == len(list(block.parameters()))
        names = {group for at, _, group, _ in groups if at == layer}
        assert names <= KNOWN, names
        assert "down" in names and names & {"q", "qkv"} and "o" in names
    assert {site for at, site, *_ in groups if at == 2} <= {"final_norm", "head"}


def test_names_that_nobody_knows_keep_their_module():
    assert group_of("mixer.conv1d.weight", attention=False) == "conv1d"
    assert group_of("A_log", attention=False) == "a_log"


def test_units_are_batches_or_runs_of_them():
    assert units(5).tolist() == [0, 1, 2, 3, 4]
    many = units(1000)
    assert many[0] == 0 and many[-1] == MAX_UNITS - 1 and set(many.tolist()) == set(range(MAX_UNITS))
    sizes = torch.bincount(torch.from_numpy(many))
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.integration
def test_many_batches_are_resampled_in_runs(monkeypatch):
    import preln.probe.gradients as gradients

    monkeypatch.setattr(gradients, "MAX_UNITS", 4)
    model, tokens = tiny_model("llama", blocks=2), ids(8)
    grouped = probe(model, tokens, measures=["grad_param"], batch_size=1, seed=2)
    paired = probe(model, tokens, measures=["grad_param"], batch_size=2, seed=2)
    assert set(grouped["n"]) == set(paired["n"]) == {4}
    for column in ("value", "low", "high"):
        torch.testing.assert_close(
            torch.tensor(grouped[column].to_numpy()),
            torch.tensor(paired[column].to_numpy()),
            rtol=1e-3,
            atol=0,
        )


@pytest.mark.integration
def test_the_tail_holds_all_at_the_first_block_and_falls():
    table = probe(tiny_model("gpt2", blocks=3), ids(), measures=["grad_tail_share"], batch_size=1)
    rows = table.sort_values("layer")
    assert rows["layer"].tolist() == [0, 1, 2, 3]
    assert rows["value"].iloc[0] == pytest.approx(1.0)
    assert (rows["value"].diff().dropna() < 0).all()
    assert (rows["low"] <= rows["value"] + 1e-12).all() and (rows["value"] <= rows["high"] + 1e-12).all()


def test_shares_are_even_where_the_norm_is_and_one_where_it_is_in_one_place():
    even = torch.ones(1, 4, 8)
    everywhere = torch.ones(1, 1, 4, dtype=torch.bool)
    token, channel = largest_shares(even, even.square().sum(-1), everywhere)
    assert (token.item(), channel.item()) == (0.25, 0.125)
    spike = torch.zeros(1, 4, 8)
    spike[0, 2, 5] = 1e18  # its square is the largest that float32 holds
    token, channel = largest_shares(spike, spike.square().sum(-1), everywhere)
    assert (token.item(), channel.item()) == (1.0, 1.0)


@pytest.mark.parametrize("shape", [(5, 16), (16, 5)])
def test_effective_rank_is_the_entropy_of_singular_values(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x[0, 0] *= 1e4  # a massive token
    masks = torch.ones(2, 2, shape[0], dtype=torch.bool)
    masks[1, :, 0] = False
    found = effective_rank(x, masks)
    for statistic in range(2):
        for row in range(2):
            values = torch.linalg.svdvals(x[row][masks[statistic, row]].double())
            p = values / values.sum()
            assert found[statistic, row].item() == pytest.approx(
                math.exp(-(p * p.log()).sum().item()), rel=1e-6
            )
    # negative control: float32 Gram matrices drown the small singular values
    assert found[0, 0] < found[1, 0]


def test_effective_rank_of_one_direction_is_one():
    x = torch.randn(1, 6, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 1, 9)
    assert effective_rank(x, torch.ones(1, 1, 6, dtype=torch.bool)).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.integration
def test_a_sequence_of_two_tokens_has_a_shape():
    result = probe_tables(tiny_model("llama", blocks=2), ids(3, 2), batch_size=1)
    assert result.layers["value"].notna().all()


@pytest.mark.integration
def test_quantised_models_give_forward_measures_only(tmp_path):
    transformers = pytest.importorskip("transformers")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32
    )
    plain = tiny_model("llama")
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            plain.get_submodule(name).weight.data = bitsandbytes.functional.dequantize_4bit(
                weight.data, weight.quant_state
            ).float()
    found = probe_tables(model, ids(5), batch_size=5)
    expected = probe_tables(plain, ids(5), batch_size=5)
    assert any("quantised" in note and "grad_hidden" in note for note in found.manifest["notes"])
    keys = ["measure", "layer", "site", "statistic"]
    mine, theirs = (r.layers.set_index(keys)["value"] for r in (found, expected))
    assert not any(key[0].startswith(("grad", "first_order")) for key in mine.index)
    for key, value in mine.items():
        assert value == pytest.approx(theirs[key], rel=0.05, abs=0.02), key
    with pytest.raises(InputError, match=r"grad_param.*quantised"):
        probe(model, ids(), measures=["grad_param"])
