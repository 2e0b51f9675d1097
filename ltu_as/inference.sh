#!/usr/bin/env bash
# Opens a page in the browser to ask about clips: bash ltu_as/inference.sh [--model NAME_OR_DIR] [--share] [--port N] ...
# Without --model it is the newest checkpoint here. Relative paths are relative to the repository root. --help: flags.
source "$(dirname "$0")/../train_scripts/run.sh"

exec "${PYTHON:-.venv/bin/python}" -m ltu_as.inference_gradio "$@"
