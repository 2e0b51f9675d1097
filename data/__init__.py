"""Curates the published datasets and contains the embedded toy dataset (`data.toy`).

The commands are run from the repository root with `python -m data.NAME`.
"""
