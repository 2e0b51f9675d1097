"""Data sets: the embedded toy set (`data.toy`) and curation of the published ones. Run from the repository root."""
