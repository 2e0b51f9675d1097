"""Facts of a clip -> questions and answers, written by any language model. Run from the root, never installed."""
