"""Writes predictions files; takes the flags of ltu.inference_batch."""

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.files import run_command
from ltu.inference_batch import main

if __name__ == "__main__":
    run_command(main)
