"""Inference: the engine, its requests, the cache of audio embeddings, sampling, predictions files."""
