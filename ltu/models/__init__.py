"""The model as Hugging Face classes: configuration, feature extraction, processor, model, generation."""
