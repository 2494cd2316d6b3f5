"""From a recipe to a model whose right parameters train, on one device or several."""
