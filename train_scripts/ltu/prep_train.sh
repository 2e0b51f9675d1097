#!/usr/bin/env bash
# Brings what LTU's scripts need: the authors' toy set and default checkpoint (370 MB), converted.
#   data/openaqa_toy/openaqa_toy.json    rows; their clips beneath, in data/openaqa_toy/audio/
#   pretrained_mdls/ltu_ori_paper/       checkpoint folder, made of pretrained_mdls/ltu_ori_paper.bin
# bash train_scripts/ltu/prep_train.sh [--full] [--eval] [--from DIR_OR_URL] [--dry_run] [--root DIR]
#   --full     also data/openaqa/stage1.json to stage4.json, of the full set and the subsets
#   --eval     also data/openaqa_eval/, the authors' evaluation questions, for eval.run
#   --from     take the files, named as at their links (a folder: NAME.zip), from a disk or a mirror
#   --dry_run  print links, sizes, places and commands
#   --root     put pretrained_mdls and data there instead of into the repository
# Run again, it goes on where it was stopped, and brings nothing twice.
# LLM: the language model, a folder or hub id. Relative paths are relative to the repository root.
source "$(dirname "$0")/../run.sh"

"${PYTHON:-.venv/bin/python}" -m ltu.released prep --kind ltu --llm "${LLM:-lmsys/vicuna-7b-v1.1}" "$@"
