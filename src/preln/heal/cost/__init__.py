"""What a recipe costs, counted from shapes."""
