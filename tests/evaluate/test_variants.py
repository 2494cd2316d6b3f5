from __future__ import annotations

import copy

import pytest
import torch

from preln.base.errors import InputError
from preln.evaluate import evaluate_tasks
from preln.evaluate.leading import Leading, shared_depth
from preln.evaluate.variants import evaluate_variants
from preln.models import drop_blocks, find_blocks, tiny_model, tiny_tokenizer, untie_head, view

pytestmark = pytest.mark.integration
TASKS = ["piqa", "arc_easy"]


@pytest.fixture(scope="module")
def models():
    dense = tiny_model("llama")
    return {"dense": dense, "without 2": drop_blocks(dense, [2]), "without 3": drop_blocks(dense, [3])}


def test_each_variant_gets_what_it_gets_alone_to_the_last_bit(models, rows_folder):
    told = {"limit": 4, "source": rows_folder, "batch_size": 3}
    found = evaluate_variants(models, tiny_tokenizer(), TASKS, **told)
    assert list(found) == list(models)
    for name, model in models.items():
        alone = evaluate_tasks(model, tiny_tokenizer(), TASKS, **told)
        assert found[name]["tasks"] == alone["tasks"]
        assert found[name]["documents"].equals(alone["documents"])
        assert found[name]["mean_acc"] == alone["mean_acc"]
        assert found[name]["source"] == alone["source"]
        assert set(alone["settings"]) < set(found[name]["settings"])
        assert found[name]["model"] == name
    assert [found[name]["settings"]["reused_batches"] > 0 for name in models] == [False, True, True]
    # negative control: the variants do differ
    assert not found["dense"]["documents"]["acc"].equals(found["without 2"]["documents"]["acc"]) or (
        found["dense"]["lm_eval"]["results"] != found["without 2"]["lm_eval"]["results"]
    )


def test_shared_blocks_are_not_run_again_and_a_budget_is_kept(models, rows_folder):
    ran = []
    handle = find_blocks(models["without 2"])[1][0].register_forward_hook(lambda *_: ran.append(1))
    told = {"limit": 4, "source": rows_folder, "batch_size": 1}
    try:
        evaluate_variants(models, tiny_tokenizer(), ["piqa"], **told)
        shared = len(ran)  # what it takes to find out that the blocks are shared
        ran.clear()
        evaluate_variants(models, tiny_tokenizer(), ["piqa"], **told, budget=0)
        assert len(ran) == 8 > shared
    finally:
        handle.remove()


def test_log_likelihoods_behind_shared_blocks_are_equal_bit_for_bit(models):
    ids = torch.randint(0, 512, (3, 17), generator=torch.Generator().manual_seed(0))
    leading = Leading(2, budget=2**20)
    for model in models.values():
        leading.begin(model)
        with torch.no_grad():
            assert torch.equal(leading.logits(ids), model(ids).logits)
            assert torch.equal(leading.logits(ids), model(ids).logits)
    assert leading.reused > 0
    assert leading.held == 3 * 17 * 64 * 4
    tight = Leading(2, budget=10)
    for model in models.values():
        tight.begin(model)
        with torch.no_grad():
            assert torch.equal(tight.logits(ids), model(ids).logits)
    assert (tight.held, tight.reused) == (0, 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma3", "opt"])
def test_the_shared_depth_is_where_the_first_cut_is(architecture):
    dense = tiny_model(architecture, blocks=6)
    assert shared_depth([dense, drop_blocks(dense, [3]), drop_blocks(dense, [3, 4])]) == 3
    assert shared_depth([dense, drop_blocks(dense, [0])]) == 0
    assert shared_depth([dense, copy.deepcopy(dense)]) == 6


def test_anything_that_differs_in_front_ends_what_is_shared():
    dense = tiny_model("llama", blocks=4)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        find_blocks(changed)[1][2].mlp.down_proj.weight[0, 0] += 1e-3
    assert shared_depth([dense, changed]) == 2
    embedded = copy.deepcopy(dense)
    with torch.no_grad():
        embedded.get_input_embeddings().weight[511, 0] += 1e-3  # a token that no probe need hold
    assert shared_depth([dense, embedded]) == 0
    healed = untie_head(copy.deepcopy(dense))
    with torch.no_grad():
        healed.lm_head.weight.mul_(0.5)
        healed.model.norm.weight.mul_(2.0)
    assert shared_depth([dense, healed]) == 4
    other = copy.deepcopy(dense)
    other.config._attn_implementation = "eager"
    assert shared_depth([dense, other]) == 0


def test_a_model_whose_blocks_cannot_be_found_shares_nothing():
    dense = tiny_model("llama")
    hidden = copy.deepcopy(dense)
    hidden.config.num_hidden_layers = 9
    assert shared_depth([dense, hidden]) == 0
    leading = Leading(0, budget=2**20)
    leading.begin(hidden)
    ids = torch.arange(6)[None]
    hidden.config.num_hidden_layers = 4
    with torch.no_grad():
        assert torch.equal(leading.logits(ids), dense(ids).logits)


def test_views_on_one_model_serve_as_variants(models, rows_folder):
    dense = models["dense"]
    blocks = find_blocks(dense)[1]
    light = {"dense": dense, "without 2": view(dense, [blocks[0], blocks[1], blocks[3]])}
    told = {"limit": 2, "source": rows_folder}
    found = evaluate_variants(light, tiny_tokenizer(), ["piqa"], **told)
    heavy = evaluate_variants(models, tiny_tokenizer(), ["piqa"], **told)
    assert found["without 2"]["documents"].equals(heavy["without 2"]["documents"])


def test_modes_are_restored_and_nothing_to_do_is_refused(models, rows_folder):
    models["dense"].train()
    try:
        evaluate_variants(models, tiny_tokenizer(), ["piqa"], limit=1, source=rows_folder)
        assert models["dense"].training
        assert not models["without 2"].training
    finally:
        models["dense"].eval()
    with pytest.raises(InputError, match="no model"):
        evaluate_variants({}, tiny_tokenizer(), ["piqa"])
