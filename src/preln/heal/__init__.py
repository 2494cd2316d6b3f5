"""Recovering a pruned model: recipes, one training loop, checkpoints, saved results.

The package is also the verb: ``preln.heal(model, tokens, recipe="partial-3")``.
"""

from __future__ import annotations

from preln.base.checkpoints import Checkpoints
from preln.base.rooms import callable_room
from preln.heal.api import HealResult, apply_trained, heal, heal_model, train
from preln.heal.options.recipe import Adapter, Recipe
from preln.heal.options.recipes import by_rate, get_recipe, override, recipe_names, register
from preln.heal.options.settings import TrainingSettings
from preln.heal.prefix.cache import Cache
from preln.heal.preparing.layout import trainable_parameters, trainable_shapes
from preln.heal.rows.examples import Examples, as_examples
from preln.heal.rows.isolation import forward_inputs, isolates
from preln.heal.rows.packing import pack
from preln.heal.save import model_card, save_healed
from preln.heal.sweep import summary, sweep
from preln.heal.training.teacher import Teacher

__all__ = [
    "Adapter",
    "Cache",
    "Checkpoints",
    "Examples",
    "HealResult",
    "Recipe",
    "Teacher",
    "TrainingSettings",
    "apply_trained",
    "as_examples",
    "by_rate",
    "forward_inputs",
    "get_recipe",
    "heal",
    "heal_model",
    "isolates",
    "model_card",
    "override",
    "pack",
    "recipe_names",
    "register",
    "save_healed",
    "summary",
    "sweep",
    "train",
    "trainable_parameters",
    "trainable_shapes",
]

callable_room(__name__)
