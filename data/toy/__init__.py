"""The embedded toy data set: 246 freely licensed sounds, five folds, and `python -m data.toy.build` for rows."""
