"""The only room that knows Hugging Face: load, find the blocks and norms, run parts, cut."""

from __future__ import annotations

from preln.models.inspect import anatomy, require_pre_ln
from preln.models.load import check_finite, load_model, model_fingerprint
from preln.models.loss import losses_from_logits, target_mask, token_losses
from preln.models.packaged import PACKAGED, licence_of, list_models
from preln.models.placement import replay
from preln.models.structure import Anatomy, Parts, Tracer, find_blocks, hidden_of
from preln.models.surgery import Stored, check_drop, drop_blocks, is_tied, untie_head, view
from preln.models.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

__all__ = [
    "ARCHITECTURES",
    "PACKAGED",
    "Anatomy",
    "Parts",
    "Stored",
    "Tracer",
    "anatomy",
    "check_drop",
    "check_finite",
    "drop_blocks",
    "find_blocks",
    "hidden_of",
    "is_tied",
    "licence_of",
    "list_models",
    "load_model",
    "losses_from_logits",
    "model_fingerprint",
    "replay",
    "require_pre_ln",
    "target_mask",
    "tiny_model",
    "tiny_tokenizer",
    "token_losses",
    "untie_head",
    "view",
]
