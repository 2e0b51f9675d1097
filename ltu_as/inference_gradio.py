"""Serves a web page for questions about clips; takes the flags of ltu.inference_gradio."""

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.files import run_command
from ltu.inference_gradio import main

if __name__ == "__main__":
    run_command(lambda: main(kind="ltu_as"))
