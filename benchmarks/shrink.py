"""A tiny random model of any model type that transformers maps to a causal language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BLOCKS, WIDTH, LIMIT = 4, 64, 200_000_000
# what a setting becomes where a configuration has it; head sizes and numbers of heads multiply to the width
SMALL: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), BLOCKS),
    **dict.fromkeys(("num_decoder_layers", "num_blocks"), BLOCKS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "embedding_dim", "input_embedding_size"), WIDTH),
    **dict.fromkeys(("output_embedding_size", "lru_width"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("num_query_groups",), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "attention_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("swa_head_dim", "v_head_dim", "attention_head_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff"), 128),
    **dict.fromkeys(("dim_ff", "ffn_hidden_size", "feed_forward_size", "d_inner", "n_inner"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "index_topk", "index_topk_blocks"), 4),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_dt_rank",), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "context_length"), 128),
    **dict.fromkeys(("model_max_length", "original_max_position_embeddings"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 16),
    **dict.fromkeys(("attention_chunk_size", "sliding_window_size"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"), 0),
    **dict.fromkeys(("decoder_start_token_id", "forced_eos_token_id", "eod_token_id"), 0),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "dim_model_base"), 16),
    **dict.fromkeys(("query_pre_attn_scalar",), 16),
    **dict.fromkeys(("patch_size", "max_window_layers"), 4),
    **dict.fromkeys(("num_kv_shared_layers", "num_mtp_layers", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("num_mel_bins", "n_langs", "num_codebooks", "audio_channels"), 1),
}
# where shrinking by name is not enough: settings that must agree with one another, or that make it a decoder
_LATENT = {"head_dim": 8, "num_key_value_heads": 4, "index_topk": 16}
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 16, "budget": 16, "compress_ratio": 4}
_QWEN4 = {f"indexer_{k}": v for k, v in _INDEXER.items()} | {"hc_count": 2, "hc_lowrank": 16}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "youtu"), _LATENT),
    "longcat_flash": {**_LATENT, "num_layers": BLOCKS, "num_hidden_layers": 2 * BLOCKS},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * BLOCKS,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": {"num_key_value_heads": 4, "per_layer_config": {}}},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "gpt_neo": {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "reformer": {
        "attn_layers": ["local", "lsh"] * (BLOCKS // 2),
        "axial_pos_embds": False,
        "num_buckets": 2,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * (BLOCKS // 2),
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * (BLOCKS // 2),
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "mamba_headdim": 32,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
}


def settings(cls: type[PreTrainedConfig], special: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make a configuration of class ``cls`` tiny, nested configurations included."""
    default: Any = cls()
    subs: Any = cls.sub_configs
    nested = [name for name in subs or () if getattr(default, name, None)]
    own = {k: v for k, v in vars(default).items() if k not in nested}
    values: dict[str, Any] = {
        k: SMALL[k] for k, v in own.items() if k in SMALL and (isinstance(v, int) or v is None) and v != -1
    }
    for name in nested:
        sub = getattr(default, name)
        values[name] = settings(type(sub), special.get(name, {}))
        values[name]["model_type"] = sub.model_type
    if "is_decoder" in own:
        values["is_decoder"] = True
    merged = values | {k: v for k, v in special.items() if not isinstance(values.get(k), dict)}
    return merged


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A tiny configuration of ``model_type``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    return cls(**settings(cls, SPECIAL.get(model_type, {})))


def tiny(model_type: str) -> PreTrainedModel:
    """A random model in evaluation mode, with gains drawn around one and weights far from zero.

    Raises:
        ValueError: It would hold more than 200 million parameters.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LIMIT:
        raise ValueError(f"{count:,} parameters even when shrunk")
    config = tiny_config(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.is_floating_point():
                empty = parameter.abs().flatten(1).sum(1) == 0
                parameter[empty] = 0.02 * torch.randn_like(parameter[empty])
                parameter.mul_(4.0)
    return model
