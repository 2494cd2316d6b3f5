"""Tiny random models of real architectures: no download, for tests and for learning the tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 512
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {"intermediate_size": 128, "num_key_value_heads": 2}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 16}
_EXPERTS: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
# what an architecture needs beyond the common part so that it stays tiny and self-consistent
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": 64},
    "gemma3": {**_GEMMA, "sliding_window": 64},
    "phi": {"intermediate_size": 128},
    "phi3": _GROUPED,
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 128},
    "gptj": {"rotary_dim": 8},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "opt-post": {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": False},
    "falcon": {},
    "bloom": {},
    "mpt": {"d_model": 64, "n_heads": 4, "max_seq_len": 512},
    "stablelm": _GROUPED,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "starcoder2": _GROUPED,
    "cohere": _GROUPED,
    "granite": _GROUPED,
    "nemotron": _GROUPED,
    "bert": {"intermediate_size": 128, "is_decoder": True},
    # norms before and behind the branches, rotary positions on half of every head
    "glm4": {**_GEMMA, "attention_bias": True},
    # norms behind the branches only, blocks with and without positions
    "exaone4": {**_GROUPED, "sliding_window": 64, "sliding_window_pattern": 2},
}
_MODEL_TYPES = {"gemma3": "gemma3_text", "opt-post": "opt"}
_NO_COMMON = {"mpt": {"hidden_size", "num_attention_heads", "max_position_embeddings"}}


def tiny_model(
    architecture: str, *, blocks: int = 4, seed: int = 0, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A random model of ``architecture`` with ``blocks`` blocks, hidden size 64, vocabulary 512, float32.

    The same seed gives the same weights. Norm gains are drawn around one, so that a formula which forgets
    the gain is wrong on these models.

    Raises:
        InputError: An architecture without a tiny form, or fewer than one block.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"tiny:{architecture}: no tiny model of that architecture; there are: {known}")
    if blocks < 1:
        raise InputError(f"tiny:{architecture}:{blocks}: a model has at least one block")
    values = {k: v for k, v in _COMMON.items() if k not in _NO_COMMON.get(architecture, set())}
    values |= {"num_hidden_layers": blocks} | ARCHITECTURES[architecture]
    if architecture == "mpt":
        values["n_layers"] = values.pop("num_hidden_layers")
    config = AutoConfig.for_model(_MODEL_TYPES.get(architecture, architecture), **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        keywords = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **keywords)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                    continue
                # a padding token's embedding starts at zero: as a separator, a vector without length
                empty = parameter.abs().flatten(1).sum(1) == 0
                parameter[empty] = 0.02 * torch.randn_like(parameter[empty])
                # the usual 0.02 leaves branches so weak that wrong formulas agree with right ones
                parameter.mul_(4.0)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a UTF-8 byte, and an end-of-text token with id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, pad_token=special
    )
