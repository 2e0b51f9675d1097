"""Serving: the OpenAI-compatible server and the page in the browser."""
