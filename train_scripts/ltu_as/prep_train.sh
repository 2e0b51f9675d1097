#!/usr/bin/env bash
# Downloads and converts the authors' toy set and default checkpoint of LTU-AS (200 MB).
#   data/openasqa_toy/openasqa_toy.json
#       the dataset file; its clips are in data/openasqa_toy/audio/
#   data/openasqa_toy/original/openasqa_toy_audio/
#       the contents of the zip, with Whisper's features; the last line printed has their path
#   pretrained_mdls/ltu_as_long_noqa_a6/
#       checkpoint folder, made of pretrained_mdls/ltuas_long_noqa_a6.bin
# bash train_scripts/ltu_as/prep_train.sh [--full] [--eval] [--mirror DIR_OR_URL] \
#     [--dry_run] [--root DIR]
#   --full     also data/openasqa/stage1.json to stage3.json, made of the full set and the subsets
#   --eval     also data/openasqa_eval/, the authors' evaluation questions, for eval.run
#   --mirror   take the files, named as at their links (a folder: NAME.zip), from a folder or the
#              address of one
#   --dry_run  print links, sizes, paths and commands
#   --root     the folder of pretrained_mdls and data; the default is the repository
# A second run continues where the first stopped, and downloads nothing twice.
# LLM: the language model, a folder or hub id. Relative paths are relative to the repository root.
source "$(dirname "$0")/../functions.sh"

"${PYTHON:-.venv/bin/python}" -m ltu_as.released prep --kind ltu_as \
    --llm "${LLM:-lmsys/vicuna-7b-v1.1}" "$@"
