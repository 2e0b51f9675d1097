"""Audio and dataset files: what the curation commands need too, so it imports no transformers."""
