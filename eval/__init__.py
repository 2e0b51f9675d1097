"""Scores predictions next to baselines on the same data. Run it from the repository root."""
