"""Defines the model as Hugging Face classes.

They are: configs, feature extractors, processor, model with its generation, and audio encoders.
"""
