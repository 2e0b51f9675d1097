"""Training: arguments, dataset and its index, collator, batch sampler, trainer."""
