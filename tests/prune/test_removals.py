from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from preln.base.errors import InputError
from preln.models import drop_blocks, tiny_model, token_losses
from preln.prune import depth_sweep, leave_one_out, prune, removal_losses
from preln.prune.walk import Walk

from .oracles import batch

pytestmark = pytest.mark.integration


def by_hand(model, ids, **how):
    losses, mask = token_losses(prune(model, **how), ids)
    return ((losses * mask).sum(1) / mask.sum(1)).numpy()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "olmo2", "phi"])
def test_every_removal_equals_a_model_that_was_really_cut(architecture):
    model, ids = tiny_model(architecture, blocks=5), batch()
    removals = {
        "none": [],
        "one": [2],
        "two": [1, 3],
        "same": [3, 1],
        "deep": [3, 4],
        "first": [0],
        "but one": [0, 1, 3, 4],
        "halves": ["1a", "3m"],
        "mixed": [2, "4a", "0m"],
    }
    found = removal_losses(model, ids, removals, batch_size=2)
    table = found.pivot(index="name", columns="sequence", values="loss")
    plain, mask = token_losses(model, ids)
    np.testing.assert_allclose(table.loc["none"], ((plain * mask).sum(1) / mask.sum(1)).numpy(), rtol=1e-5)
    for name, gone in removals.items():
        if name == "none":
            continue
        np.testing.assert_allclose(table.loc[name], by_hand(model, ids, drop=gone), rtol=1e-5, err_msg=name)
    assert (table.loc["two"] == table.loc["same"]).all()
    assert not np.allclose(table.loc["two"], table.loc["deep"], rtol=1e-4)


def test_both_halves_are_the_block_and_no_loss_depends_on_the_batch_size():
    model, ids = tiny_model("llama", blocks=4), batch()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    sets = {"block": [2], "halves": ["2a", "2m"], "other": ["2a", 1]}
    small, large = (removal_losses(model, ids, sets, attention_mask=mask, batch_size=size) for size in (1, 8))
    pd.testing.assert_frame_equal(small, large, rtol=1e-5)
    table = large.pivot(index="name", columns="sequence", values="loss")
    assert (table.loc["block"] == table.loc["halves"]).all()


def test_all_single_blocks_and_all_depths_are_the_routines_made_for_them():
    model, ids = tiny_model("gpt2", blocks=5), batch()
    singles = removal_losses(model, ids, {"-1": [], **{str(k): [k] for k in range(5)}})
    pd.testing.assert_series_equal(singles["loss"], leave_one_out(model, ids)["loss"])
    depths = removal_losses(model, ids, {str(k): list(range(k, 5)) for k in range(6)})
    pd.testing.assert_series_equal(depths["loss"], depth_sweep(model, ids)["loss"], rtol=1e-6)


def test_what_sets_share_is_run_once(monkeypatch):
    model, ids = tiny_model("llama", blocks=6), batch()
    ran = []
    through = Walk.through

    def counted(self, state, indices):
        indices = list(indices)
        ran.extend(indices)
        return through(self, state, indices)

    monkeypatch.setattr(Walk, "through", counted)
    removal_losses(model, ids, {str(k): [k] for k in range(6)}, batch_size=8)
    assert len(ran) == 15  # L (L - 1) / 2: the blocks behind each one
    ran.clear()
    removal_losses(model, ids, {str(k): list(range(k, 6)) for k in range(7)}, batch_size=8)
    assert ran == []
    removal_losses(model, ids, {"a": [1, 2, 4], "b": [1, 2, 5], "c": [1, 2, 4]}, batch_size=8)
    assert sorted(ran) == [3, 4, 5]  # 3 for all three, then 5 for one and 4 for the other


@pytest.mark.parametrize(
    ("removals", "message"),
    [
        ({"x": [5]}, "x: block 5 is out of range: there are blocks 0 to 3"),
        ({"x": ["4a"]}, "x: block 4 is out of range"),
        ({"x": ["1x"]}, "name a half as 5a"),
    ],
)
def test_what_is_not_there_is_refused(removals, message):
    with pytest.raises(InputError, match=message):
        removal_losses(tiny_model("llama", blocks=4), batch(), removals)


def test_losses_that_are_not_finite_name_the_removal():
    model = tiny_model("llama", blocks=4)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="without middle: the loss is not finite"):
        removal_losses(model, batch(), {"middle": [1, 2]})


def test_all_blocks_may_go_here_the_embedding_alone_is_left():
    model, ids = tiny_model("llama", blocks=3), batch()
    found = removal_losses(model, ids, {"all": [0, 1, 2]})["loss"]
    np.testing.assert_allclose(found, depth_sweep(model, ids).query("layer == 0")["loss"], rtol=1e-6)
    assert drop_blocks(model, [0, 1]) is not None
