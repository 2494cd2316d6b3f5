"""The loop, its steps and losses, and the processes that share it."""
