"""A page in the browser to ask about clips: takes the flags of ltu.inference_gradio."""

import sys

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.inference_gradio import main

if __name__ == "__main__":
    try:
        main(kind="ltu_as")
    except (OSError, ValueError) as error:  # The user's to mend; a traceback would hide the message.
        sys.exit(f"error: {error}")
