#!/usr/bin/env bash
# Brings what LTU-AS's scripts need: the authors' toy set and default checkpoint (200 MB), converted.
#   data/openasqa_toy/openasqa_toy.json       rows; their clips beneath, in data/openasqa_toy/audio/
#   data/openasqa_toy/original/openasqa_toy_audio/   what was in the zip, features too; the last line printed names them
#   pretrained_mdls/ltu_as_long_noqa_a6/      checkpoint folder, made of pretrained_mdls/ltuas_long_noqa_a6.bin
# bash train_scripts/ltu_as/prep_train.sh [--full] [--eval] [--from DIR_OR_URL] [--dry_run] [--root DIR]
#   --full     also data/openasqa/stage1.json to stage3.json, of the full set and the subsets
#   --eval     also data/openasqa_eval/, the authors' evaluation questions, for eval.run
#   --from     take the files, named as at their links (a folder: NAME.zip), from a disk or a mirror
#   --dry_run  print links, sizes, places and commands
#   --root     put pretrained_mdls and data there instead of into the repository
# Run again, it goes on where it was stopped, and brings nothing twice.
# LLM: the language model, a folder or hub id. Relative paths are relative to the repository root.
source "$(dirname "$0")/../run.sh"

"${PYTHON:-.venv/bin/python}" -m ltu.released prep --kind ltu_as --llm "${LLM:-lmsys/vicuna-7b-v1.1}" "$@"
