"""Small and weightless Llamas from transformers, for what is counted rather than computed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from preln.base.errors import require

LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(config: Mapping[str, Any], device: str, **more: Any) -> Any:
    """Return an untied transformers Llama of a configuration; on `meta` it has shapes and no weights.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    modeling = require("transformers.models.llama", extra="all")
    config = {**config, "tie_word_embeddings": False, "use_cache": False, **more}
    with torch.device(device):
        return modeling.LlamaForCausalLM(modeling.LlamaConfig(**config))


def with_adapters(model: Any, rank: int) -> Any:
    """Return the model with LoRA of one rank on every linear map of its blocks, all else frozen.

    Raises:
        MissingExtraError: peft is not installed.
    """
    remarks = logging.getLogger("bitsandbytes")
    level = remarks.level
    remarks.setLevel(logging.ERROR)  # peft imports it, and it remarks on kernels that nothing here uses
    try:
        peft = require("peft", extra="heal")
    finally:
        remarks.setLevel(level)
    with warnings.catch_warnings():
        # peft asks transformers for an attribute by its old name
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=list(LINEAR_MAPS)))
