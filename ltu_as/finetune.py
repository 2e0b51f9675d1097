"""Train one stage of LTU-AS: python -m ltu_as.finetune takes the flags of ltu.finetune."""

import sys

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.finetune import main

if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
