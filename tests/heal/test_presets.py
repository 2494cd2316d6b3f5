from __future__ import annotations

import pytest

from preln.base.errors import InputError
from preln.heal import get_recipe, recipe_names
from preln.heal.options.recipe import LLAMA_LINEAR, LLAMA_MLP
from preln.heal.options.recipes import by_rate

REASSESS = ("head", "partial-1", "partial-2", "partial-3", "partial-7", "lora", "qlora")


@pytest.mark.parametrize("name", [f"reassess-{name}" for name in REASSESS] + ["shortened-lora"])
def test_reassessing_and_shortened_llama(name: str) -> None:
    recipe = get_recipe(name)
    wanted = recipe.settings
    rate = 1e-4 if name == "shortened-lora" else 1e-5
    assert (wanted.learning_rate, wanted.batch_size, wanted.warmup_steps) == (rate, 64, 100)
    assert (wanted.epochs, wanted.schedule, wanted.select, recipe.length) == (2, "linear", "best", 256)
    assert (recipe.supervise, recipe.data) == ("response", "alpaca-cleaned")
    memory = (wanted.optimizer, wanted.gradient_checkpointing, recipe.quantised)
    assert memory == (("paged_adamw_8bit", True, "nf4") if "qlora" in name else ("adamw", False, None))
    if recipe.adapter is not None:
        adapter = recipe.adapter
        assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.dora) == (8, 16, 0.05, False)
        assert adapter.targets == LLAMA_LINEAR
    assert "defaults" not in recipe.source
    assert "2024" in recipe.source


@pytest.mark.parametrize(("name", "rate"), [("uidl-qlora", 3e-4), ("uidl-qlora-70b", 3e-5)])
def test_the_unreasonable_ineffectiveness(name: str, rate: float) -> None:
    recipe = get_recipe(name)
    wanted = recipe.settings
    assert (wanted.learning_rate, wanted.schedule, wanted.batch_size) == (rate, "cosine", 16)
    assert (wanted.steps, wanted.epochs, wanted.warmup_steps, recipe.length) == (5000, None, 100, 2048)
    assert (recipe.quantised, recipe.supervise, recipe.data) == ("nf4", "all", "C4")
    adapter = recipe.adapter
    assert (adapter.targets, adapter.mlp_only, adapter.dropout) == (LLAMA_MLP, True, 0.05)
    assert adapter.numerator == adapter.rank
    tokens = wanted.steps * wanted.batch_size * recipe.length
    assert round(tokens / 1e6) == 164  # the lower end of what was published


@pytest.mark.parametrize(
    ("share", "name", "rank", "rate", "steps"),
    [
        (0.1, "rate-10", 8, 1e-4, 100),
        (0.15, "rate-15", 8, 1e-4, 125),
        (0.2, "rate-20", 8, 1e-4, 150),
        (0.21, "rate-21", 8, 5e-5, 205),
        (8 / 30, "rate-27", 8, 5e-5, 235),
        (0.3, "rate-30", 8, 5e-5, 250),
        (0.4, "rate-40", 16, 5e-5, 400),
        (0.45, "rate-45", 16, 2e-5, 450),
        (0.5, "rate-50", 16, 2e-5, 500),
    ],
)
def test_the_table_by_pruning_rate(share: float, name: str, rank: int, rate: float, steps: int) -> None:
    recipe = by_rate(share)
    assert (recipe.name, recipe.adapter.rank) == (name, rank)
    assert (recipe.settings.learning_rate, recipe.settings.steps) == (rate, steps)
    assert 2 <= recipe.settings.batch_size <= 4
    assert "without a confirmed source" in recipe.source
    assert get_recipe(name) == recipe


@pytest.mark.parametrize("share", [0.0, 0.09, 0.51, 1.0, -0.2, float("nan"), True])
def test_shares_outside_the_table(share: float) -> None:
    with pytest.raises(InputError, match=r"covers 0\.1 to 0\.5"):
        by_rate(share)


def test_ends_of_the_rows_are_registered() -> None:
    assert [name for name in recipe_names() if name.startswith("rate-")] == [
        "rate-20", "rate-30", "rate-40", "rate-50",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"share 0\.6"):
        get_recipe("rate-60")
