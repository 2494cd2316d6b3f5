"""A healed model on disk: a plain checkpoint or a PEFT adapter, its table, its manifest and its card."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preln.base.errors import InputError
from preln.base.files import hash_tree, staged_directory, write_json, write_parquet, write_text
from preln.heal.options.recipes import Recipe

if TYPE_CHECKING:
    from preln.heal.record import HealResult


def check_target(out: str | os.PathLike[str], recipe: Recipe, *, adapter: bool) -> None:
    """Whether a result of this recipe could be saved under ``out``, asked before anything is trained.

    Raises:
        InputError: The folder holds something, or an adapter is wanted of a recipe that makes none.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: exists and is not an empty folder: name another --out or remove it")
    if adapter and recipe.adapter is None:
        raise InputError(f"recipe {recipe.name}: makes no adapter: save the whole model, or use lora")


def save_healed(
    result: HealResult, tokenizer: Any, out: str | os.PathLike[str], *, adapter: bool = False
) -> Path:
    """Write a healed model to a new folder, whole or not at all.

    Beside the weights it holds ``training.parquet``, ``manifest.json`` (with the SHA-256 of every other file)
    and ``README.md``, the model card.

    Args:
        result: What :func:`preln.heal.train` returned; of a sharded run, in process 0.
        tokenizer: Saved with the model; None saves none.
        out: The folder; must be absent or empty.
        adapter: Save only the adapter, as a folder that ``PeftModel.from_pretrained`` loads on top of the
            pruned model, instead of the merged model that ``AutoModelForCausalLM`` loads.

    Raises:
        InputError: The folder is not empty, or the recipe made no adapter.
    """
    if adapter and result.adapter_config is None:
        raise InputError(f"recipe {result.manifest['recipe']['name']}: makes no adapter: use lora")
    with staged_directory(out, checksums=True) as staged:
        if adapter:
            from safetensors.torch import save_file

            config = copy.copy(result.adapter_config)
            config.inference_mode = True  # as peft itself stores it: loading then freezes the adapter
            config.save_pretrained(staged)
            save_file(result.trained, staged / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            _save_model(result.model, staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        write_parquet(staged / "training.parquet", result.history)
        write_text(staged / "README.md", model_card(result, adapter=adapter))
        write_json(staged / "manifest.json", {**result.manifest, "files": hash_tree(staged)})
    return Path(out)


def _save_model(model: Any, folder: Path) -> None:
    """``save_pretrained`` without its progress bar, which would also show where nobody looks."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def model_card(result: HealResult, *, adapter: bool = False) -> str:
    """The model card: what was trained, on what, and the loss before and after."""
    manifest = result.manifest
    recipe, settings, data = manifest["recipe"], manifest["settings"], manifest["data"]
    library = "peft" if adapter else "transformers"
    loading = (
        "model = PeftModel.from_pretrained(pruned_model, folder)"
        if adapter
        else "model = AutoModelForCausalLM.from_pretrained(folder)"
    )
    share = manifest["trainable_parameters"] / manifest["total_parameters"]
    rows = [
        ("recipe", f"`{recipe['name']}`"),
        ("trained", _trained(recipe)),
        ("trainable parameters", f"{manifest['trainable_parameters']:,} ({share:.2%})"),
        ("learning rate", f"{settings['learning_rate']:g}, {settings['schedule']}"),
        ("warm-up steps", settings["warmup_steps"]),
        ("steps x batch", f"{manifest['steps']} x {settings['batch_size']} sequences"),
        ("training tokens", f"{manifest['tokens']:,} ({manifest['supervised_tokens']:,} supervised)"),
        ("training time", f"{manifest['seconds']:.0f} s on {manifest['numerics']['device']}"),
        ("weights kept", f"of step {manifest['selected_step']} ({settings['select']})"),
        ("loss before", _loss(manifest["loss_before"])),
        ("loss after", _loss(manifest["loss_after"])),
        ("training data, SHA-256", f"`{data['train']}`"),
        ("validation data, SHA-256", f"`{data['validation']}`" if data["validation"] else "none"),
        ("model before healing, SHA-256", f"`{manifest['model']['sha256']}`"),
        ("seed", settings["seed"]),
        ("preln", manifest["packages"]["preln"]),
    ]
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [pruned, healed, preln]",
        "---",
        "",
        f"# A pruned model healed with `{recipe['name']}`",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "Losses are means over held-out tokens, in nats. Settings: " + recipe["source"] + ".",
        *(f"\nNote: {note}." for note in manifest["notes"]),
        "",
        "```python",
        loading,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _trained(recipe: dict[str, Any]) -> str:
    if recipe["adapter"] is not None:
        adapter = recipe["adapter"]
        form = f"rank {adapter['rank']}, alpha {adapter['alpha']}, dropout {adapter['dropout']}"
        kind = "DoRA" if adapter["dora"] else "LoRA"
        where = "the blocks' MLPs" if adapter["mlp_only"] else "the blocks' linear maps, not on the head"
        base = " over a 4-bit (NF4) base" if recipe["quantised"] else ""
        return f"{kind} adapters ({form}) on {where}{base}"
    if recipe["kind"] == "full":
        return "every parameter"
    if recipe["kind"] == "seam":
        return f"the {recipe['blocks']} block(s) in front of every cut, in full"
    blocks = recipe["blocks"]
    last = "" if blocks == 0 else ", last block" if blocks == 1 else f", last {blocks} blocks"
    return f"final norm, head{last}, in full"


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
