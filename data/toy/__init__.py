"""Contains the embedded toy dataset: 246 freely licensed sounds, five folds, and spoken clips.

`python -m data.toy.build` generates the training examples of LTU, and with `--kind ltu_as` those of
LTU-AS.
"""
