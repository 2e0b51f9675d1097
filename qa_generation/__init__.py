"""Generates questions and answers about clips with any language model.

The input of the language model is what is known of a clip. The package runs from the repository
root and is never installed.
"""
