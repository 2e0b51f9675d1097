"""Lists, downloads and prepares released files; takes the arguments of ltu.released."""

import ltu_as  # noqa: F401  registers the converter that makes checkpoints of LTU-AS
from ltu.files import run_command
from ltu.released import main

if __name__ == "__main__":
    run_command(main)
