"""Models whose parts accelerate places: the same numbers, and no part outside the devices."""

import pandas as pd
import pytest
import torch

from preln.base.errors import InputError
from preln.models import drop_blocks, load_model, model_fingerprint, view
from preln.models.inspect import anatomy
from preln.models.spread import settle
from preln.probe import probe_tables
from preln.prune import leave_one_out, score

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = load_model("tiny:llama:4")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(checkpoint):
    return load_model(str(checkpoint))[0]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))


def test_a_placed_model_is_the_model(checkpoint, plain, tokens):
    placed, _ = load_model(str(checkpoint), device_map={"": "cpu"})
    assert model_fingerprint(placed) == model_fingerprint(plain)
    with torch.inference_mode():
        assert torch.equal(placed(tokens).logits, plain(tokens).logits)


def test_a_part_outside_the_devices_is_refused(checkpoint):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 3 else "disk" for i in range(4)}
    with pytest.raises(InputError, match=r"no room for 'model\.layers\.3\.") as error:
        load_model(str(checkpoint), device_map=places)
    assert "\n" not in str(error.value)


def dispatched(checkpoint):
    """A model with accelerate's hooks on every block, as one that is spread over several devices has."""
    from accelerate import dispatch_model

    model, _ = load_model(str(checkpoint))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(4)}
    model = dispatch_model(model, device_map=places, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    return model


def test_accelerates_own_hooks_would_run_the_blocks_that_were_cut(checkpoint, plain, tokens):
    model = dispatched(checkpoint)
    shown = view(model, list(anatomy(model).blocks)[:2])
    with torch.inference_mode():
        assert torch.equal(
            shown(tokens, use_cache=False).logits, plain(tokens).logits
        )  # all four: what settle mends


def test_measuring_goes_through_the_hooks_of_a_spread_model(checkpoint, plain, tokens):
    hooked = settle(dispatched(checkpoint))
    moved = []
    for block in anatomy(hooked).blocks:
        (hook,) = block._forward_pre_hooks.values()
        assert hook.device == torch.device("cpu")
        block.register_forward_pre_hook(lambda *_: moved.append(1))
    for table in (
        lambda model: probe_tables(model, tokens, batch_size=2, seed=0).layers,
        lambda model: score(model, tokens, ["block_influence", "taylor", "sleb"]),
        lambda model: leave_one_out(model, tokens),
    ):
        pd.testing.assert_frame_equal(table(hooked), table(plain))
    with torch.inference_mode():
        for keep in ([0, 2, 3], [0, 1]):
            blocks = [anatomy(hooked).blocks[i] for i in keep]
            cut = drop_blocks(plain, [i for i in range(4) if i not in keep])
            assert torch.equal(view(hooked, blocks)(tokens, use_cache=False).logits, cut(tokens).logits)
        small = drop_blocks(hooked, [1])
        assert all(block._forward_pre_hooks for block in anatomy(small).blocks)
        assert torch.equal(small(tokens).logits, drop_blocks(plain, [1])(tokens).logits)
    assert moved
