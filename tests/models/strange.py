"""Decoders written by hand, each with one thing that a measured anatomy must see or refuse."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH, VOCABULARY = 32, 64


class Attention(nn.Module):
    """Causal mean over the past with learned values: mixes tokens, and depends on nothing else."""

    def __init__(self):
        super().__init__()
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states):
        count = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
        values = self.v_proj(hidden_states).cumsum(1) / count[:, None].to(hidden_states.dtype)
        return self.o_proj(values)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Block(nn.Module):
    """An ordinary Pre-LN block; the strange ones override a piece."""

    norm = nn.LayerNorm

    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = self.norm(WIDTH), self.norm(WIDTH)
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, hidden_states):
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return middle + self.mlp(self.post_attention_layernorm(middle))


class Config(PretrainedConfig):
    model_type = "strange"

    def __init__(self, num_hidden_layers=3, **kwargs):
        self.hidden_size, self.vocab_size = WIDTH, VOCABULARY
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class Strange(PreTrainedModel):
    """Embedding, blocks, final norm, head; ``between`` may touch the stream between the blocks."""

    config_class = Config

    def __init__(self, config, blocks, between=None):
        super().__init__(config)
        self.embed, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.between = between

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x)
            x = x if self.between is None else self.between(x)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))


def model_of(*blocks, seed=0, layers=None, between=None):
    """A random model of the given blocks, gains drawn around one."""
    model = Strange(Config(layers or len(blocks)), blocks, between)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.any() and "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def plain(kind, count=3, between=None, **settings):
    """A model of ``count`` blocks of one kind."""
    torch.manual_seed(0)
    return model_of(*[kind(**settings) for _ in range(count)], between=between)


class Scaled(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return 0.5 * self.weight * x


class FakeNorm(Block):
    norm = Scaled


class HalfFake(Block):
    def __init__(self):
        super().__init__()
        self.post_attention_layernorm = Scaled(WIDTH)


class NormsSomethingElse(Block):
    def forward(self, hidden_states):
        shifted = hidden_states + hidden_states.roll(1, -1)
        middle = hidden_states + self.self_attn(self.input_layernorm(shifted))
        return middle + self.mlp(self.post_attention_layernorm(middle))


class MLPNormsTheInputAndMore(Block):
    def forward(self, hidden_states):
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return middle + self.mlp(self.post_attention_layernorm(middle + hidden_states))


class IgnoresAttention(Block):
    def forward(self, hidden_states):
        self.self_attn(self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ReadsTheStreamToo(Block):
    """The attention takes a norm's output, and the unnormed stream behind its back."""

    def forward(self, hidden_states):
        gate = torch.tanh(hidden_states.mean(-1, keepdim=True)) * hidden_states
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states)) + gate
        return middle + self.mlp(self.post_attention_layernorm(middle))


class ScaledStream(Block):
    def forward(self, hidden_states):
        middle = 0.9 * hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return middle + self.mlp(self.post_attention_layernorm(middle))


class NormedStream(Block):
    def forward(self, hidden_states):
        x = self.input_layernorm(hidden_states)
        middle = self.post_attention_layernorm(x + self.self_attn(x))
        return middle + self.mlp(middle)


class LayerScale(Block):
    """A learnable factor on each branch: per channel, or ReZero's one number."""

    def __init__(self, value=0.3, width=WIDTH):
        super().__init__()
        self.alpha, self.beta = (nn.Parameter(torch.full((width,), value)) for _ in range(2))

    def forward(self, hidden_states):
        middle = hidden_states + self.alpha * self.self_attn(self.input_layernorm(hidden_states))
        return middle + self.beta * self.mlp(self.post_attention_layernorm(middle))


class LateBias(Block):
    """The attention's bias is added by the block."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, hidden_states):
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states)) + self.bias
        return middle + self.mlp(self.post_attention_layernorm(middle))


class ZeroInitialised(Block):
    def __init__(self, *zeroed):
        super().__init__()
        for name in zeroed:
            module = self.get_submodule(name)
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


class ParallelZero(ZeroInitialised):
    def forward(self, hidden_states):
        attended = self.self_attn(self.input_layernorm(hidden_states))
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class Dropping(Block):
    """Dropout, and whole branches left out at random while training."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states):
        if self.training and torch.rand(()) < 0.5:
            return hidden_states
        middle = hidden_states + self.dropout(self.self_attn(self.input_layernorm(hidden_states)))
        return middle + self.dropout(self.mlp(self.post_attention_layernorm(middle)))


class AlwaysRandom(Block):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 0.1 * torch.randn_like(hidden_states)


class PostRMS(Block):
    norm = nn.RMSNorm

    def forward(self, hidden_states):
        middle = self.input_layernorm(hidden_states + self.self_attn(hidden_states))
        return self.post_attention_layernorm(middle + self.mlp(middle))


class Sandwich(Block):
    def __init__(self):
        super().__init__()
        self.attention_out_norm, self.mlp_out_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, hidden_states):
        attended = self.attention_out_norm(self.self_attn(self.input_layernorm(hidden_states)))
        middle = hidden_states + attended
        return middle + self.mlp_out_norm(self.mlp(self.post_attention_layernorm(middle)))


class HalfSandwich(Sandwich):
    def forward(self, hidden_states):
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        return middle + self.mlp_out_norm(self.mlp(self.post_attention_layernorm(middle)))


class RootWidthNorm(nn.Module):
    """``sqrt(d) g x/|x|``: RMSNorm with its factor of the width written out."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class RootWidth(Block):
    norm = RootWidthNorm


class Overwrites(Block):
    def forward(self, hidden_states):
        hidden_states += self.self_attn(self.input_layernorm(hidden_states))
        hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class SharedExpert(Block):
    """Two modules behind one norm make up the second branch."""

    def __init__(self):
        super().__init__()
        self.shared = MLP()

    def forward(self, hidden_states):
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states))
        normed = self.post_attention_layernorm(middle)
        return middle + self.mlp(normed) + self.shared(normed)


class ThirdBranch(Block):
    """Something is added behind the MLP that no norm of the block stands in front of."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states):
        y = super().forward(hidden_states)
        return y + self.extra(y)


class TwoStreams(Block):
    """Reversible: the second stream is handed on beside the first."""

    def forward(self, hidden_states, other=None):
        other = hidden_states if other is None else other
        other = other + self.self_attn(self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(other)), other


class Reversible(Strange):
    def forward(self, input_ids, use_cache=False):
        x = other = self.embed(input_ids)
        for layer in self.layers:
            x, other = layer(x, other)
        return CausalLMOutput(logits=self.lm_head(self.norm(x + other)))
