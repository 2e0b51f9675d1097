#!/usr/bin/env bash
# Downloads and converts the authors' toy set and default checkpoint of LTU (370 MB).
#   data/openaqa_toy/openaqa_toy.json  the dataset file; its clips are in data/openaqa_toy/audio/
#   pretrained_mdls/ltu_ori_paper/     checkpoint folder, made of pretrained_mdls/ltu_ori_paper.bin
# bash train_scripts/ltu/prep_train.sh [--full] [--eval] [--mirror DIR_OR_URL] \
#     [--dry_run] [--root DIR]
#   --full     also data/openaqa/stage1.json to stage4.json, made of the full set and the subsets
#   --eval     also data/openaqa_eval/, the authors' evaluation questions, for eval.run
#   --mirror   take the files, named as at their links (a folder: NAME.zip), from a folder or the
#              address of one
#   --dry_run  print links, sizes, paths and commands
#   --root     the folder of pretrained_mdls and data; the default is the repository
# A second run continues where the first stopped, and downloads nothing twice.
# LLM: the language model, a folder or hub id. Relative paths are relative to the repository root.
source "$(dirname "$0")/../functions.sh"

"${PYTHON:-.venv/bin/python}" -m ltu.released prep --kind ltu \
    --llm "${LLM:-lmsys/vicuna-7b-v1.1}" "$@"
