"""From stored tables to numbers that decide hypotheses, and to verdicts."""
