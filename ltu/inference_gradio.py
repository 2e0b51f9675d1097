"""A page in the browser to ask about clips, and the endpoint `/predict` that the original's demo had.

    bash ltu/inference.sh                         the newest checkpoint of this kind in exp/ and pretrained_mdls/
    bash ltu/inference.sh --model ltu_ori_paper   a name of python -m ltu.released: brought, converted once, opened
    bash ltu/inference.sh --model DIR --share     a folder or hub id; opened to the public, too

Notable:
- It listens on this machine only, and its page loads nothing from other hosts (but with --share, which says so).
- A clip is an upload, never a path or an address in a request. Uploads lie in a folder that goes with the process, and
  nothing is logged but how many questions ended how.
"""

import argparse
import os
import signal
import sys
import tempfile

from ltu.checkpoints.released_files import find_or_make
from ltu.files import run_command
from ltu.inference.generation_flags import add_generation_flags, open_engine, refuse_unused
from ltu.serving.gradio_page import Demo


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    add_generation_flags(parser)
    parser.add_argument(
        "--from", dest="source", help="folder or address with files of the released table's names"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="also at a public address of Gradio's, for a week"
    )
    parser.add_argument("--max_seconds", type=float, default=600, help="of a clip")
    parser.add_argument("--max_mb", type=int, default=100, help="of a file")
    return refuse_unused(
        parser, parser.parse_args(["--model", "", *(sys.argv[1:] if argv is None else argv)])
    )


def main(argv: list[str] | None = None, kind: str = "ltu") -> None:
    args = parse_args(argv)
    args.model = str(find_or_make(args.model, kind, args.llm, args.source))
    if args.share or args.host != "127.0.0.1":
        print(
            "Whoever has the address can ask. With --share, all goes through Gradio's servers.",
            file=sys.stderr,
        )
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # As Ctrl-C: uploads are removed, questions counted.
    with tempfile.TemporaryDirectory(prefix="ltu_demo_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        demo = Demo(open_engine(args), args)
        demo.launch()
        print(
            "Questions:",
            ", ".join(f"{count} {how}" for how, count in demo.counts.most_common()) or "none",
        )


if __name__ == "__main__":
    run_command(main)
