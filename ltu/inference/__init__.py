"""Generates answers: engine, requests, cache of audio embeddings, sampling, predictions files."""
