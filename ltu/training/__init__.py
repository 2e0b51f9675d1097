"""Trains a model: arguments, dataset and its index, collator, batch sampler, trainer, loss logs."""
