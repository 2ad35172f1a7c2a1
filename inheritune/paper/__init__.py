"""The paper's tables and figures: its numbers as data, ours beside them, verdicts."""
