"""Trains one stage of LTU-AS; takes the flags of ltu.finetune."""

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.files import run_command
from ltu.finetune import main

if __name__ == "__main__":
    run_command(main)
