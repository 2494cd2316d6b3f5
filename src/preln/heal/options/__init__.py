"""What a recipe is: its parts and settings, the registry, the published presets."""
