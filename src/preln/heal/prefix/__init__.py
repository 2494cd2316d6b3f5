"""States in front of the blocks that train, computed once and kept."""
