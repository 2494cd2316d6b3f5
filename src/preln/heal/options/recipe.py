"""What a recipe is: plain data that says which parameters train, against which loss, with which settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from preln.base.errors import InputError
from preln.heal.options.settings import TrainingSettings, is_real, is_whole

LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")
KINDS = ("tail", "full", "seam", "lora")
OBJECTIVES = ("next_token", "distill", "seam")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: ``W + (alpha / rank) B A``, with ``A`` random and ``B`` zero at the start.

    Attributes:
        rank: Rows of ``A``.
        alpha: Numerator of the scale; None: the rank, so that the scale is 1 whatever the rank.
        dropout: Probability of zeroing an input of the adapter while it trains; 0 with ``dora``.
        targets: Last names of the linear maps adapted in every block. Where a block lacks one of them
            (another architecture), every linear map of the blocks is adapted. The head never is.
        mlp_only: Whether maps inside attention are left out, however they are called.
        dora: Whether the length of each row of the weight trains by itself beside its direction (DoRA, Liu et
            al. 2024): ``m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|``, row by row.
    """

    rank: int = 8
    alpha: float | None = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = LLAMA_LINEAR
    mlp_only: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: A field is out of range; the line names it.
        """
        if not (is_whole(self.rank) and self.rank >= 1):
            raise InputError(f"rank={self.rank!r}: must be a whole number of at least 1")
        if self.alpha is not None and not (is_real(self.alpha) and self.alpha > 0):
            raise InputError(f"alpha={self.alpha!r}: must be a positive number, or None for the rank")
        if not (is_real(self.dropout) and 0 <= self.dropout < 1):
            raise InputError(f"dropout={self.dropout!r}: must be at least 0 and below 1")
        if isinstance(self.targets, str) or not all(isinstance(name, str) for name in self.targets):
            raise InputError(f"targets={self.targets!r}: give a tuple of last names of linear maps")
        for name in ("mlp_only", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.dora and self.dropout:  # peft's DoRA leaves it out unless the base map runs a second time
            raise InputError(f"dropout={self.dropout}: is not applied with dora: use dropout=0")

    @property
    def numerator(self) -> float:
        """``alpha``, or the rank where none is given."""
        return self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class Recipe:
    """What trains, against which loss, and how by default.

    Attributes:
        name: Name on the command line and in every result.
        kind: What trains: ``tail``, the final norm, the head and the last ``blocks`` blocks; ``full``, every
            parameter; ``seam``, the ``blocks`` blocks in front of every cut; ``lora``, an adapter.
        settings: Training settings of this recipe unless overridden.
        summary: One line for people.
        blocks: Blocks trained in full (``tail`` and ``seam``).
        adapter: The adapter (``lora`` only).
        length: Tokens a training row is cut to where rows of text are given.
        source: Where the numbers come from.
        quantised: ``nf4`` keeps the linear maps of the blocks in 4 bits while an adapter trains (QLoRA,
            Dettmers et al. 2023); None leaves them as they are.
        objective: The loss: ``next_token``, ``distill`` (towards the logits of the unpruned model), ``seam``
            (towards its hidden states where blocks were cut).
        temperature: tau of ``distill``, whose loss is ``tau^2 KL(teacher || student)`` at ``logits / tau``.
        next_token_weight: w of ``distill``: the loss is ``(1 - w)`` of the above and ``w`` of the next-token
            loss.
        template: Form of instruction rows: ``alpaca``, ``chat``, or ``auto`` (the tokenizer's own, if any).
        supervise: What counts in the loss of instruction rows: the ``response``, or ``all``.
        data: The data that the source trains on, for people.
    """

    name: str
    kind: str
    settings: TrainingSettings
    summary: str
    blocks: int = 0
    adapter: Adapter | None = None
    length: int = 256
    source: str = "defaults for runs of a few dozen steps"
    quantised: str | None = None
    objective: str = "next_token"
    temperature: float = 1.0
    next_token_weight: float = 0.0
    supervise: str = "response"
    template: str = "auto"
    data: str | None = None

    def __post_init__(self) -> None:
        """Check that the fields make sense together.

        Raises:
            InputError: They do not; the line names the recipe and the field.
        """
        if self.kind not in KINDS or (self.kind == "lora") != (self.adapter is not None):
            raise InputError(
                f"{self.name}: kind {self.kind!r} must be tail, full or seam, or lora with an adapter"
            )
        least = 1 if self.kind == "seam" else 0
        if not (is_whole(self.blocks) and self.blocks >= least):
            raise InputError(
                f"{self.name}: blocks={self.blocks!r}: must be a whole number of at least {least}"
            )
        if self.blocks and self.kind not in ("tail", "seam"):
            raise InputError(
                f"{self.name}: blocks={self.blocks}: only tail and seam train single blocks: use 0"
            )
        if not (is_whole(self.length) and self.length >= 2):
            raise InputError(f"{self.name}: length={self.length!r}: must be a whole number of at least 2")
        if self.quantised not in (None, "nf4"):
            raise InputError(f"{self.name}: quantised={self.quantised!r}: choose nf4 or None")
        if self.quantised is not None and self.adapter is None:
            raise InputError(
                f"{self.name}: quantised={self.quantised}: 4-bit weights do not train: use kind lora"
            )
        if self.template not in ("alpaca", "chat", "auto"):
            raise InputError(f"{self.name}: template={self.template!r}: choose alpaca, chat or auto")
        if self.supervise not in ("response", "all"):
            raise InputError(f"{self.name}: supervise={self.supervise!r}: choose response or all")
        self._check_objective()

    def _check_objective(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(
                f"{self.name}: objective={self.objective!r}: choose one of {', '.join(OBJECTIVES)}"
            )
        if self.objective == "seam" and self.kind == "tail":
            raise InputError(
                f"{self.name}: objective=seam: head and norm stand behind every seam: use kind seam"
            )
        if not (is_real(self.temperature) and self.temperature > 0):
            raise InputError(f"{self.name}: temperature={self.temperature!r}: must be a positive number")
        weight = self.next_token_weight
        if not (is_real(weight) and 0 <= weight <= 1):
            raise InputError(f"{self.name}: next_token_weight={weight!r}: must be from 0 to 1")
        if weight and self.objective != "distill":
            raise InputError(f"{self.name}: next_token_weight={weight}: only distill mixes two losses: use 0")

    @property
    def teacher(self) -> bool:
        """Whether the loss needs the unpruned model."""
        return self.objective != "next_token"

    @property
    def needs_drop(self) -> bool:
        """Whether the recipe must know which blocks were removed."""
        return self.kind == "seam" or self.objective == "seam"

    def settings_for(self, **overrides: Any) -> TrainingSettings:
        """The recipe's settings with overrides; None leaves a field as it is.

        A warm-up that is not given is cut to a tenth of the steps given, so that a short run still trains.

        Raises:
            InputError: A name that is no setting, or a value out of range.

        >>> recipe = Recipe("mine", "full", TrainingSettings(steps=30, warmup_steps=3), "everything")
        >>> recipe.settings_for(steps=10).warmup_steps
        1
        """
        steps, warmup = overrides.get("steps"), overrides.get("warmup_steps")
        if isinstance(steps, int) and warmup is None:
            overrides["warmup_steps"] = min(self.settings.warmup_steps, max(steps, 0) // 10)
        return self.settings.replaced(**overrides)

    def described(self) -> dict[str, Any]:
        """The recipe as plain data, without its settings: what decides the form of the trained tensors."""
        entries = dataclasses.asdict(self)
        del entries["settings"], entries["summary"], entries["data"]
        if self.adapter is not None:
            entries["adapter"]["alpha"] = self.adapter.numerator
        return entries
