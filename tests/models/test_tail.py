from __future__ import annotations

import pytest
import torch

from preln.base.errors import InputError
from preln.models import ARCHITECTURES, find_blocks, replay, tiny_model, token_losses
from preln.models.residual import as_tokens, forward_losses
from preln.models.tail import Tail
from preln.models.through import StandIn, run_blocks

pytestmark = pytest.mark.integration


def batch(n=2, t=9, seed=3):
    return torch.randint(1, 512, (n, t), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@torch.no_grad()
def test_blocks_and_tail_are_the_model(architecture):
    model, tokens = tiny_model(architecture, blocks=2), as_tokens(batch())
    blocks = find_blocks(model)[1]
    state, calls = run_blocks(model, blocks, tokens)
    expected = forward_losses(model, tokens)
    torch.testing.assert_close(Tail(model).losses(state, tokens), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(Tail(model, rows=5).losses(state, tokens), expected, rtol=1e-5, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    tail = Tail(model, rows=100)  # from here on transformers leaves hooks of its own
    final = model(input_ids=tokens.ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    normed = tail.normed(state.flatten(0, 1), tokens.ids.flatten())
    torch.testing.assert_close(normed, final.flatten(0, 1), rtol=1e-5, atol=1e-6)
    # the calls run every block again, and keep no hidden state alive
    before, _ = run_blocks(model, blocks[:1], tokens)
    torch.testing.assert_close(replay(blocks[1], calls[1], before), state, rtol=0, atol=0)
    assert not any(v is before for args, kwargs in calls for v in (*args, *kwargs.values()))


@torch.no_grad()
def test_all_rows_in_one_chunk_give_the_same_bits():
    model, tokens = tiny_model("llama"), as_tokens(batch(3, 17))
    state, _ = run_blocks(model, find_blocks(model)[1], tokens)
    ids = tokens.ids.flatten()
    whole = model(input_ids=tokens.ids, use_cache=False).logits.flatten(0, 1)
    assert torch.equal(Tail(model).logits(state.flatten(0, 1), ids), whole)


@torch.no_grad()
def test_padding_costs_no_head_and_changes_no_loss():
    model, ids = tiny_model("gemma2"), batch(3, 8)
    padded = torch.cat([ids, torch.full((3, 6), 7)], dim=1)
    mask = torch.cat([torch.ones(3, 8), torch.zeros(3, 6)], dim=1).long()
    tokens = as_tokens(padded, mask)
    state, _ = run_blocks(model, find_blocks(model)[1], tokens)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[:-1].numel()))
    losses = Tail(model, rows=4).losses(state, tokens)
    handle.remove()
    assert max(seen) == 4
    assert sum(seen[-6:]) == 3 * 7  # after the first looks at three tokens
    torch.testing.assert_close(losses[:, :7], token_losses(model, ids)[0], rtol=1e-5, atol=1e-5)
    assert losses[:, 7:].eq(0).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "cohere"])
def test_the_chunked_gradient_is_that_of_the_loss(architecture):
    model, tokens = tiny_model(architecture), as_tokens(batch())
    model.requires_grad_(False)
    state, _ = run_blocks(model, find_blocks(model)[1], tokens)
    tail = Tail(model, rows=3)
    losses, gradient = tail.losses_and_gradient(state, tokens, 16.0)
    leaf = state.clone().requires_grad_(True)
    expected = Tail(model).losses(leaf, tokens)
    (slope,) = torch.autograd.grad(expected.sum() / 16.0, leaf)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-7)
    assert gradient[:, -1].eq(0).all()


@pytest.mark.parametrize(
    ("architecture", "chained"), [("llama", True), ("gpt2", True), ("gemma2", False), ("cohere", False)]
)
@torch.no_grad()
def test_the_embedding_is_left_away_only_where_a_chain_is_the_tail(architecture, chained):
    """Capped or scaled logits are no chain of modules, and must not be taken for one."""
    model, tokens = tiny_model(architecture), as_tokens(batch())
    state, _ = run_blocks(model, find_blocks(model)[1], tokens)
    tail, lookups = Tail(model), []
    tail.losses(state, tokens)
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: lookups.append(1))
    torch.testing.assert_close(
        tail.losses(state, tokens), forward_losses(model, tokens), rtol=1e-5, atol=1e-6
    )
    handle.remove()
    assert len(lookups) == (1 if chained else 2)  # one of them is the whole model's


def test_a_tail_that_mixes_tokens_is_refused():
    model, tokens = tiny_model("llama"), as_tokens(batch())
    model.model.norm.register_forward_hook(lambda m, a, out: out.cumsum(dim=1))
    with torch.no_grad():
        state, _ = run_blocks(model, find_blocks(model)[1], tokens)
        with pytest.raises(InputError, match="mixes tokens"):
            Tail(model).losses(state, tokens)


def test_a_second_stream_is_refused():
    model, tokens = tiny_model("llama"), as_tokens(batch())
    blocks = find_blocks(model)[1]
    for scale, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda m, a, k, s=scale: (a, {**k, "memory": a[0] * (s + 2.0)}), with_kwargs=True
        )
    with pytest.raises(InputError, match="second hidden state"), torch.no_grad():
        run_blocks(model, blocks, tokens)
    with pytest.raises(InputError, match="block 3"), torch.no_grad():
        run_blocks(tiny_model("gpt2"), blocks, tokens)


def test_a_stand_in_tells_of_what_kind_its_block_is():
    """As models do that choose a mask by their blocks' kinds of attention."""
    model = tiny_model("llama", blocks=2)
    block = model.model.layers[0]
    block.attention_type, block.forward = "sliding_attention", block.forward
    stand = StandIn(model, block)
    assert stand.attention_type == "sliding_attention"
    assert "forward" not in vars(stand) and not list(stand.children())
