"""Contains the embedded toy dataset: 246 freely licensed sounds, five folds, and spoken clips.

`python -m data.toy.build` and `python -m data.toy.build_ltu_as` generate the training examples.
"""
