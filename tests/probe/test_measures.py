from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from preln.base.errors import InputError
from preln.models import tiny_model
from preln.probe import probe, probe_tables
from preln.probe.measures import DEFAULT, GROUPS

pytestmark = pytest.mark.integration


def batch(n=3, t=7, seed=3):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(seed))


def keyed(frame):
    return frame.set_index(["measure", "layer", "site", "statistic"])["value"].to_dict()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_every_measure_equals_its_definition(architecture, definitions):
    model, ids = tiny_model(architecture, blocks=3), batch(2, 5)
    run = definitions.Run(model, ids, architecture)
    result = probe_tables(model, ids, batch_size=1)
    found, expected = keyed(result.layers), definitions.expected(run)
    assert {k for k in found if k[0] not in ("norm_sigma_bound", "norm_sigma_tightness")} == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-4, abs=1e-6), key
    assert result.manifest["loss"] == pytest.approx(run.loss, rel=1e-5)
    assert set(result.layers["measure"]) == {name for group in DEFAULT for name in GROUPS[group]}
    pairs = result.pairs.set_index(["start", "size"])
    for key, (everywhere, last) in definitions.expected_pairs(run).items():
        assert pairs.loc[key, "angular_distance"] == pytest.approx(everywhere, abs=1e-6)
        assert pairs.loc[key, "angular_distance_last_token"] == pytest.approx(last, abs=1e-6)
    assert len(pairs) == 3 * 4 // 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_the_lens_is_the_model_without_its_last_blocks(architecture, definitions):
    model, ids = tiny_model(architecture, blocks=3), batch(2, 6)
    found = keyed(probe(model, ids, measures=["lens"], batch_size=1))
    expected = definitions.expected_lens(definitions.Run(model, ids, architecture))
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key
    assert found["lens_agreement", 3, "block", "mean"] == 1.0


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_measures_taken_together_are_those_taken_apart(architecture):
    model, ids = tiny_model(architecture, blocks=2), batch(4, 6)
    together = probe(model, ids, measures=[*DEFAULT, "lens"], batch_size=1)
    for group in (*DEFAULT, "lens"):
        alone = probe(model, ids, measures=[group], batch_size=1)
        rows = together[together["measure"].isin(set(alone["measure"]))].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, rows)


def test_negative_control_the_state_after_the_final_norm_is_another(definitions):
    model, ids = tiny_model("llama", blocks=3), batch()
    after = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].detach().double()
    wrong = after.pow(2).mean(-1).sqrt().mean().item()
    found = keyed(probe(model, ids, measures=["residual_rms"]))["residual_rms", 3, "block", "mean"]
    assert abs(found - wrong) > 1e-2 * wrong


def test_norm_sigma_is_under_its_bound_and_gains_matter():
    table = probe(tiny_model("llama"), batch()).set_index(["layer", "site", "statistic"])
    sigma = table[table["measure"] == "norm_sigma"]["value"]
    bound = table[table["measure"] == "norm_sigma_bound"]["value"]
    plain = table[table["measure"] == "norm_sigma_no_gain"]["value"]
    assert (sigma <= bound * (1 + 1e-6)).all() and (sigma > 0.5 * bound).all()
    assert not np.allclose(sigma, plain[sigma.index], rtol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_is_masked_everywhere(architecture, side):
    model = tiny_model(architecture, blocks=3)
    short, long = batch(2, 6, seed=1), batch(2, 9, seed=2)
    padded = torch.zeros(4, 9, dtype=torch.long)
    mask = torch.zeros_like(padded)
    place = slice(3, 9) if side == "left" else slice(0, 6)
    padded[:2, place], mask[:2, place] = short, 1
    padded[2:], mask[2:] = long, 1
    result = probe_tables(model, padded, attention_mask=mask, batch_size=4)
    # per sequence, the padded batch gives what the sequences give by themselves
    alone = [probe_tables(model, row[None]) for row in (*short, *long)]
    columns = ["measure", "layer", "site", "statistic"]
    for index, single in enumerate(alone):
        mine = result.sequences[result.sequences["sequence"] == index].set_index(columns)["value"]
        theirs = single.sequences.set_index(columns)["value"]
        np.testing.assert_allclose(mine[theirs.index], theirs, rtol=5e-4, atol=2e-6)
    weights = np.array([1, 1, 1, 1]) * np.array([6, 6, 9, 9])
    angles = np.average([p.pairs["angular_distance"] for p in alone], axis=0, weights=weights)
    np.testing.assert_allclose(result.pairs["angular_distance"], angles, atol=1e-6)
    last = np.mean([p.pairs["angular_distance_last_token"] for p in alone], axis=0)
    np.testing.assert_allclose(result.pairs["angular_distance_last_token"], last, atol=1e-6)


def test_values_do_not_depend_on_batch_size():
    model, ids = tiny_model("gpt2", blocks=3), batch(5)
    one, all_ = keyed(probe(model, ids, batch_size=1)), keyed(probe(model, ids, batch_size=5))
    assert one.keys() == all_.keys()
    for key, value in one.items():
        assert all_[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_first_order_damage_is_the_derivative_of_the_loss(architecture):
    """L with block k's update scaled by 1 - t: dL/dt at 0, by central differences in float64."""
    model, ids = tiny_model(architecture, blocks=3).double(), batch()
    found = keyed(probe(model, ids, measures=["first_order_damage"]))
    blocks = model.transformer.h if architecture == "gpt2" else model.model.layers

    def loss(k, t):
        def scale(module, args, output):
            y = output[0] if isinstance(output, tuple) else output
            mixed = args[0] + (1 - t) * (y - args[0])
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        handle = blocks[k].register_forward_hook(scale)
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
        finally:
            handle.remove()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    step = 1e-2
    for k in range(3):
        # Richardson: the error of the fourth-order difference is far under float32 norms' noise
        slope = (8 * (loss(k, step) - loss(k, -step)) - (loss(k, 2 * step) - loss(k, -2 * step))) / (
            12 * step
        )
        assert found["first_order_damage", k, "block", "mean"] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_the_model_is_left_as_it_was():
    model, ids = tiny_model("llama"), batch()
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].requires_grad_(False)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    probe(model, ids)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_hooks_go_even_when_the_pass_fails():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(InputError, match="block 2, mlp"):
        probe(model, batch())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 3] = float("inf")
    with pytest.raises(InputError, match="block 1, attention"):
        probe(model, batch())


def test_pre_ln_measures_are_refused_elsewhere_and_left_out_by_default():
    model, ids = tiny_model("opt-post"), batch()
    with pytest.raises(InputError, match=r"norm_sigma.*post-ln"):
        probe(model, ids, measures=["norm_sigma"])
    table = probe(model, ids)
    assert "norm_sigma" not in set(table["measure"]) and "grad_hidden" in set(table["measure"])
    assert any("norm_sigma" in note for note in table.attrs["notes"])
    streams = table[~table["measure"].str.startswith("grad_param")]
    assert set(streams["site"]) == {"block"}


@pytest.mark.parametrize(
    ("tokens", "keywords", "line"),
    [
        (torch.zeros(2, 3), {}, "token ids"),
        (torch.ones(2, 1, dtype=torch.long), {}, "no next token"),
        (torch.ones(2, 5, dtype=torch.long), {"measures": ["nonsense"]}, "unknown"),
        (torch.ones(2, 5, dtype=torch.long), {"measures": []}, "no measure"),
        (torch.ones(2, 5, dtype=torch.long), {"attention_mask": torch.ones(2, 4)}, "does not fit"),
        (torch.ones(2, 5, dtype=torch.long), {"batch_size": 0}, "batch size"),
    ],
)
def test_bad_input_is_one_line(tokens, keywords, line):
    with pytest.raises(InputError, match=line) as error:
        probe(tiny_model("llama"), tokens, **keywords)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["gemma", "gpt_neox", "phi", "opt", "olmo2", "mixtral"])
def test_other_architectures_agree_with_plain_hidden_states(architecture):
    model, ids = tiny_model(architecture, blocks=3), batch()
    found = keyed(probe(model, ids, measures=["residual_rms", "update_ratio", "grad_hidden"]))
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(3):
        rms = states[layer].double().pow(2).mean(-1).sqrt().mean().item()
        assert found["residual_rms", layer, "block", "mean"] == pytest.approx(rms, rel=1e-5)


def test_a_token_without_length_has_no_update_ratio():
    from preln.models import tiny_model

    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 0.0
    ids = torch.arange(3, 35).view(2, 16)
    assert (ids == 7).sum() == 1
    table = probe(model, ids, measures=["update_ratio"], bootstrap=0)
    values = table[(table["statistic"] == "mean") & (table["site"] == "block")].sort_values("layer")["value"]
    assert np.isfinite(values).all()
    states = []
    handle = model.model.layers[0].register_forward_hook(lambda m, args, out: states.extend([args[0], out]))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    lengths = states[0].norm(dim=-1)
    ratios = (states[1] - states[0]).norm(dim=-1)[lengths > 0] / lengths[lengths > 0]
    assert len(ratios) == 31
    assert values.iloc[0] == pytest.approx(float(ratios.mean()), rel=1e-5)
