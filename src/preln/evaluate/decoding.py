"""A batch of sequences on its way: the prompt in one pass, then a token at a time with the cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from preln.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoding:
    """Prefill and decode by hand, as generation does, so that each pass can be timed and counted.

    Positions count real tokens and padding is masked, so a left-padded sequence is continued as it would be
    alone. Only the last position's logits are computed where the model allows it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Stand beside a model in evaluation mode, see :func:`evaluating`."""
        self.model: Any = model
        self.device = device_of(model)
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.cache: Any = None
        self._mask: Tensor = torch.empty(0)

    def prefill(
        self, ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b v"]:
        """Run the prompts through an empty cache; the logits of the token that follows each.

        Args:
            ids: Token ids, padded on the left.
            attention_mask: 1 where a token is real, or None where all are.
        """
        self.cache = None
        self._mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return self._run(ids, (self._mask.cumsum(1) - 1).clamp_min(0))

    def step(self, ids: Int[Tensor, " b"]) -> Float[Tensor, "b v"]:
        """Append one token to every sequence; the logits of the token that follows."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._run(ids[:, None], self._mask.sum(1, keepdim=True) - 1)

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        told = {"position_ids": positions} if self._takes_positions else {}
        output = self.model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self.cache,
            use_cache=True,
            **told,
            **self._last,
        )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            kind = type(self.model).__name__
            raise InputError(f"{kind}: returns no key-value cache: decoding by steps is not supported")
        return output.logits[:, -1]


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is restored."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids."""
    return next(model.get_input_embeddings().parameters()).device


def check_room(model: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences longer than the model's positions.

    Raises:
        InputError: They are.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and tokens > most:
        raise InputError(
            f"{tokens} tokens a sequence: the model has {most} positions: shorten prompt or continuation"
        )
