"""Recovering a pruned model: recipes, one training loop, checkpoints, saved results.

The package is also the verb: ``preln.heal(model, tokens, recipe="partial-3")``.
"""

from __future__ import annotations

from preln.base.checkpoints import Checkpoints
from preln.base.rooms import callable_room
from preln.heal.api import HealResult, apply_trained, heal, heal_model, train
from preln.heal.examples import Examples, as_examples
from preln.heal.layout import trainable_parameters, trainable_shapes
from preln.heal.recipes import Adapter, Recipe, get_recipe, recipe_names, register
from preln.heal.save import model_card, save_healed
from preln.heal.settings import TrainingSettings

__all__ = [
    "Adapter",
    "Checkpoints",
    "Examples",
    "HealResult",
    "Recipe",
    "TrainingSettings",
    "apply_trained",
    "as_examples",
    "get_recipe",
    "heal",
    "heal_model",
    "model_card",
    "recipe_names",
    "register",
    "save_healed",
    "train",
    "trainable_parameters",
    "trainable_shapes",
]

callable_room(__name__)
