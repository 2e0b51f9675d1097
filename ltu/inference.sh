#!/usr/bin/env bash
# Serves a page in the browser that answers questions about clips:
#     bash ltu/inference.sh [--model NAME_OR_DIR] [--share] [--port N] ...
# Without --model it uses the newest checkpoint. Relative paths are relative to the repository root.
# --help lists the flags.
source "$(dirname "$0")/../train_scripts/functions.sh"

exec "${PYTHON:-.venv/bin/python}" -m ltu.inference_gradio "$@"
