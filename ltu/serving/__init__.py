"""Serves a model over HTTP: the OpenAI-compatible server and the page in the browser."""
