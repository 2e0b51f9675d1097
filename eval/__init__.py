"""Scores of predictions, beside baselines on the same data. Run from the repository root."""
