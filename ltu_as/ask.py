"""Answers one question about one clip; takes the arguments of ltu.ask."""

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.ask import main
from ltu.files import run_command

if __name__ == "__main__":
    run_command(main)
