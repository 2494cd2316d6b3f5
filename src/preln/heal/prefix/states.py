"""What a frozen prefix of blocks makes of every row, computed once and kept in a memory-mapped file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from preln.base.errors import InputError
from preln.base.files import locked_file, read_json, sha256_file, write_json
from preln.base.progress import track
from preln.heal.rows.examples import Examples
from preln.heal.rows.isolation import forward_inputs
from preln.models import find_blocks
from preln.models.through import states_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_FLUSH = 256  # rows between two notes of how far the file is filled


@dataclass
class Prefix:
    """States x[depth] of every row, ``[n, T, d]`` a depth, in one safetensors file.

    Attributes:
        path: The file.
        depths: The depths held.
    """

    path: Path
    depths: tuple[int, ...]
    _maps: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def states(self, depth: int, rows: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """x[depth] of some rows ``[b, T, d]``, on a device and in a dtype."""
        return self._maps[depth][list(rows)].to(device=device, dtype=dtype)


def prefix_bytes(examples: Examples, width: int, depths: Sequence[int], dtype: str) -> int:
    """Bytes that the states of some rows take: ``n T d`` numbers a depth."""
    return examples.input_ids.numel() * width * len(set(depths)) * DTYPES[dtype].itemsize


def build_prefix(
    model: PreTrainedModel,
    examples: Examples,
    depths: Sequence[int],
    folder: str | os.PathLike[str],
    *,
    identity: dict[str, Any],
    dtype: str = "float32",
    batch_size: int = 4,
    budget: int | None = None,
    label: str = "prefix",
) -> Prefix:
    """Run the blocks in front of the deepest of ``depths`` once over every row, and keep x[depth].

    One forward pass in inference mode gives all depths (HEAL-PREFIX: while these blocks are frozen and in
    evaluation mode, training from the stored states is training the whole model). The file is filled in place
    and takes its name when it is whole; a build that was stopped goes on at the rows that it had noted. Of
    several processes that want the same file, one fills it and the others wait.

    Args:
        model: The model, in evaluation mode, with the weights that stay frozen.
        examples: The rows.
        depths: Which x[l] to keep, 1 to L.
        folder: Where the file is kept; a whole file of the same identity is taken as it is.
        identity: What the states depend on: the model's and the rows' fingerprints.
        dtype: ``float32``, ``bfloat16`` or ``float16``: how numbers are stored; narrower ones are rounded.
        batch_size: Rows in one pass.
        budget: Most bytes that the file may take; None sets no limit but the disk's.
        label: Of the progress bar, and of the file.

    Raises:
        InputError: More bytes than the budget or the disk hold, another run's or a corrupted file, states
            that are not finite or overflow the dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"cache dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    blocks = list(find_blocks(model)[1])
    wanted = tuple(sorted(set(depths)))
    if not wanted or not 1 <= wanted[0] <= wanted[-1] <= len(blocks):
        raise InputError(f"prefix depths {list(wanted)}: give depths from 1 to {len(blocks)}")
    width = model.config.get_text_config().hidden_size
    shape = [*examples.input_ids.shape, width]
    own = {**identity, "depths": list(wanted), "dtype": dtype, "shape": shape}
    root = Path(folder)
    path, note = root / f"{label}.safetensors", root / f"{label}.json"
    if path.exists() and note.exists():
        return _reopen(path, note, own)
    root.mkdir(parents=True, exist_ok=True)
    with locked_file(root / f".{label}.lock"):
        if path.exists() and note.exists():  # by whom this process waited for
            return _reopen(path, note, own)
        _check_room(root, prefix_bytes(examples, width, wanted, dtype), budget)
        _build(model, blocks, examples, own, path, note, batch_size)
        return Prefix(path, wanted, _open(path, wanted, shape, dtype, shared=False))


def _build(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    examples: Examples,
    own: dict[str, Any],
    path: Path,
    note: Path,
    batch_size: int,
) -> None:
    """Fill a file, or what a build that was stopped has left of it, and give it its name."""
    wanted, shape, dtype = own["depths"], own["shape"], own["dtype"]
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".progress.json")
    done = 0
    if partial.exists() and progress.exists():
        former = read_json(progress)
        done = int(former["rows"]) if former["identity"] == own else 0
    if not done:
        _create(partial, wanted, shape, dtype)
    maps = _open(partial, wanted, shape, dtype, shared=True)
    starts = list(range(done, len(examples), batch_size))
    for start in track(starts, label=path.stem, total=len(starts)):
        rows = range(start, min(start + batch_size, len(examples)))
        _fill(model, blocks, examples.take(rows), maps, rows)
        if rows[-1] + 1 - done >= _FLUSH and rows[-1] + 1 < len(examples):
            done = rows[-1] + 1
            _sync(partial)
            write_json(progress, {"identity": own, "rows": done})
    del maps
    _sync(partial)
    write_json(note, {"identity": own, "sha256": sha256_file(partial)})
    os.replace(partial, path)
    progress.unlink(missing_ok=True)


def _reopen(path: Path, note: Path, own: dict[str, Any]) -> Prefix:
    """A whole file, once it is known to be the one asked for.

    Raises:
        InputError: It belongs to another model, data or depths, or has changed.
    """
    stored = read_json(note)
    held = {**stored["identity"], "depths": None}
    mend = "remove the folder, or name another"
    if held != {**own, "depths": None} or not set(own["depths"]) <= set(stored["identity"]["depths"]):
        raise InputError(f"{path}: states of another model, data or form: {mend}")
    if sha256_file(path) != stored["sha256"]:
        raise InputError(f"{path}: does not match its SHA-256: {mend}")
    depths = tuple(stored["identity"]["depths"])
    return Prefix(path, depths, _open(path, depths, own["shape"], own["dtype"], shared=False))


def _check_room(root: Path, needed: int, budget: int | None) -> None:
    free = shutil.disk_usage(root).free
    limit = free if budget is None else min(free, budget)
    if needed > limit:
        what = "the disk has left" if limit == free else "the cache may take"
        raise InputError(
            f"{root}: stored states need {needed / 2**30:.2f} GiB and {what} {limit / 2**30:.2f}: give a "
            "larger cache budget, a narrower cache dtype or fewer rows, or turn the cache off"
        )


def _header(depths: Sequence[int], shape: Sequence[int], dtype: str) -> bytes:
    size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    entries = {
        f"x{depth}": {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [place * size, (place + 1) * size],
        }
        for place, depth in enumerate(depths)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the numbers aligned
    return struct.pack("<Q", len(text)) + text


def _create(path: Path, depths: Sequence[int], shape: Sequence[int], dtype: str) -> None:
    """A safetensors file of the right size, its numbers not yet there."""
    head = _header(depths, shape, dtype)
    size = torch.Size(shape).numel() * DTYPES[dtype].itemsize * len(depths)
    with path.open("wb") as file:
        file.write(head)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, len(head) + size)  # a full disk fails here, not in a pass
        file.truncate(len(head) + size)


def _open(
    path: Path, depths: Sequence[int], shape: Sequence[int], dtype: str, *, shared: bool
) -> dict[int, Tensor]:
    """The file's tensors by depth, memory-mapped; written through if shared."""
    offset, total = len(_header(depths, shape, dtype)), path.stat().st_size
    raw = torch.from_file(str(path), shared=shared, size=total, dtype=torch.uint8)[offset:]
    numbers = raw.view(DTYPES[dtype]).view(len(depths), *shape)
    return dict(zip(depths, numbers, strict=True))


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@torch.inference_mode()
def _fill(
    model: PreTrainedModel, blocks: Sequence[nn.Module], part: Examples, maps: dict[int, Tensor], rows: range
) -> None:
    """Store the states of some rows.

    Raises:
        InputError: A state that is not finite, in the model or in the stored dtype, naming row and depth.
    """
    device = next(model.get_input_embeddings().parameters()).device
    found = states_at(model, blocks, forward_inputs(model, part.to(device)), maps)
    for depth, kept in maps.items():
        stored = found[depth].to("cpu", kept.dtype)
        if not bool(torch.isfinite(stored).all()):
            row = rows[int((~torch.isfinite(stored)).flatten(1).any(1).nonzero()[0])]
            raise InputError(
                f"row {row}: x[{depth}] is not finite in {str(kept.dtype).removeprefix('torch.')}: "
                "check the model's weights, or store wider numbers"
            )
        kept[rows.start : rows.stop] = stored
