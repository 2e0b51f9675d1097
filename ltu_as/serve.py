"""Answer over HTTP as OpenAI's chat completions do: python -m ltu_as.serve takes the arguments of ltu.serve."""

import sys

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.serve import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FileNotFoundError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
