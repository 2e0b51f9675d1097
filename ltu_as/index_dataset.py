"""Writes an Arrow index of a dataset file; takes the arguments of ltu.index_dataset."""

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.files import run_command
from ltu.index_dataset import main

if __name__ == "__main__":
    run_command(main)
