"""Loads audio and reads dataset files. The curation commands use it: it imports no transformers."""
