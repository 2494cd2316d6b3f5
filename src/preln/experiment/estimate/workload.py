"""What a pass over tokens asks of a machine, from a model's shapes: products, and bytes beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from preln.experiment.outline import Planned
from preln.heal.cost.shapes import block_shape
from preln.heal.preparing.parts import layout

# Numbers read or written beside the products, for every number that a block's linear maps take or give:
# norms, rotation, activation, residual sums. Fitted to the passes of a committed run (see estimate.py);
# the way back moves twice as many, since it reads what was kept and writes a gradient.
MOVED = 4.0
# float32 numbers that a loss moves a logit: widened, exponentiated, summed, and the chunk itself (derived)
LOGIT = 4.0
TABLES = 1e6  # bytes of a step's tables


@dataclass(frozen=True)
class Load:
    """Work, in units that a machine has rates for.

    Attributes:
        operations: Floating-point operations of matrix products, two a multiply-add.
        moved: Bytes moved beside them.
        read: Bytes of weights that products read, once a pass.
        calls: Blocks called, forward or back.
        disk: Bytes written to disk or read from it.
        hashed: Bytes that SHA-256 is taken of.
        fixed: Seconds that no machine's rate tells.
    """

    operations: float = 0.0
    moved: float = 0.0
    read: float = 0.0
    calls: float = 0.0
    disk: float = 0.0
    hashed: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Load:
        return Load(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Demand:
    """What one step asks for.

    Attributes:
        step: The step.
        load: Its work.
        memory: Bytes that it needs at once, on the device; on a processor, everything.
        disk: Bytes that stay in its folder.
        scratch: Bytes on disk while it runs: checkpoints.
        stored: Bytes on disk from here on: states of a frozen prefix that it is the first to need.
        sharded: Whether several devices can share its work, not only its memory.
        notes: What was assumed.
    """

    step: Planned
    load: Load
    memory: float
    disk: float = TABLES
    scratch: float = 0.0
    stored: float = 0.0
    sharded: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        blocks: Number of blocks.
        maps: Operations a token of a block's linear maps, mean over blocks.
        heads: Numbers over all heads, mean over blocks.
        wide: Numbers a token that a block's linear maps take and give, mean over blocks.
        held: Parameters of a block, mean over blocks.
        parameters: All of them, shared ones once.
        hidden: Width of the stream.
        vocabulary: Rows of the head.
        size: Bytes a number.
        tied: Whether head and embedding share their table.
    """

    blocks: int
    maps: float
    heads: float
    wide: float
    held: float
    parameters: int
    hidden: int
    vocabulary: int
    size: int
    tied: bool

    @property
    def bytes(self) -> float:
        """Of all weights."""
        return float(self.parameters * self.size)

    def without(self, drop: int) -> Shape:
        """The same model without so many blocks; which ones does not matter where blocks are alike."""
        gone = round(drop * self.held)
        return replace(self, blocks=self.blocks - drop, parameters=self.parameters - gone)


@dataclass(frozen=True)
class Windows:
    """Token windows and how many go through the model at a time."""

    count: float
    length: float
    batch: int = 4

    @property
    def tokens(self) -> float:
        """All of them."""
        return self.count * self.length

    @property
    def passes(self) -> int:
        """Batches."""
        return math.ceil(self.count / self.batch)

    @property
    def together(self) -> float:
        """Tokens of one batch."""
        return min(self.count, self.batch) * self.length


def shape_of(model: Any) -> Shape:
    """Sizes of a model, also of one on the meta device.

    Raises:
        InputError: Blocks whose products shapes do not tell; see :func:`preln.heal.cost.shapes.block_shape`.
    """
    found, config = layout(model), model.config.get_text_config()
    blocks = [block_shape(model, name) for name in found.blocks]
    count = len(blocks)
    held = sum(p.numel() for name in found.blocks for p in model.get_submodule(name).parameters())
    unique = {id(p): p for p in model.parameters()}.values()
    head = model.get_output_embeddings().weight
    extra = 0 if not found.tied or head is model.get_input_embeddings().weight else head.numel()
    return Shape(
        blocks=count,
        maps=float(sum(m.operations for b in blocks for m in b.maps)) / count,
        heads=sum(b.width for b in blocks) / count,
        wide=float(sum((m.inputs + m.outputs) * m.uses for b in blocks for m in b.maps)) / count,
        held=held / count,
        parameters=sum(p.numel() for p in unique) - extra,
        hidden=config.hidden_size,
        vocabulary=head.shape[0],
        size=head.dtype.itemsize,
        tied=found.tied,
    )


def forward(shape: Shape, rows: Windows, *, blocks: float | None = None, heads: float = 1.0) -> Load:
    """Passes through so many blocks (all if None), and so many times the head: ``2 i o`` a map and token."""
    count = shape.blocks if blocks is None else blocks
    each = shape.maps + 4.0 * rows.length * shape.heads
    return Load(
        operations=rows.tokens * (count * each + heads * 2.0 * shape.vocabulary * shape.hidden),
        moved=rows.tokens * (count * MOVED * shape.wide * shape.size + heads * LOGIT * 4 * shape.vocabulary),
        read=rows.passes * shape.size * (count * shape.held + heads * shape.vocabulary * shape.hidden),
        calls=rows.passes * count,
    )


def backward(shape: Shape, rows: Windows, *, weights: bool) -> Load:
    """The way back to every block's input, and where ``weights``, to every parameter, gradients added up."""
    once = forward(shape, rows)
    each = shape.maps * (2 if weights else 1) + 8.0 * rows.length * shape.heads
    head = 2.0 * shape.vocabulary * shape.hidden * (2 if weights else 1)
    return Load(
        operations=rows.tokens * (shape.blocks * each + head),
        moved=2 * once.moved + weights * rows.passes * 3.0 * shape.bytes,
        read=once.read,
        calls=2 * once.calls,
    )


def left_out(shape: Shape, rows: Windows) -> Load:
    """The loss without each single block: from block k + 1 on for every k, and a head each."""
    count = shape.blocks
    return forward(shape, rows, blocks=count * (count - 1) / 2, heads=count)
