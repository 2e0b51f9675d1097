"""Serves a page in the browser that answers questions about clips, and the endpoint `/predict`.

    bash ltu/inference.sh                         the newest checkpoint in exp/, pretrained_mdls/
    bash ltu/inference.sh --model ltu_ori_paper   a released one: downloaded and converted once
    bash ltu/inference.sh --model DIR --share     a folder or hub id; reachable from the internet

`/predict` has the parameters of the original's demo. By default only this machine can reach the
page, and the page loads nothing from other hosts; with --share its scripts are from Gradio's host.
A clip is an upload, never a path or an address in a request. An upload is removed after an hour,
and all are when the process ends. While the page is served, the process prints nothing but its
address, and type and place of the first error at each place in the code; at the end the number of
questions by status, and of failed events by type and place.
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
from ltu.serving.gradio_security import discard_output

LOCAL_HOST = "127.0.0.1"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags. Without --model it is "", the newest checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_generation_flags(parser)
    parser.add_argument(
        "--mirror",
        metavar="DIR_OR_URL",
        help="Take released files, which have the table's names, from a folder or the address of "
        "one.",
    )
    parser.add_argument(
        "--host",
        default=LOCAL_HOST,
        help="Address to bind; 0.0.0.0 makes the page reachable from other machines.",
    )
    parser.add_argument(
        "--port", type=int, help="Port to bind; by default the first free one from 7860."
    )
    parser.add_argument(
        "--share",
        action="store_true",
        help="Also make the page reachable at a public address of Gradio's for a week.",
    )
    parser.add_argument(
        "--max_seconds", type=float, default=600, help="Maximum length of a clip in seconds."
    )
    parser.add_argument("--max_mb", type=int, default=100, help="Maximum size of an upload in MiB.")
    flags = sys.argv[1:] if argv is None else argv
    # --model is required by the other commands. Here the default comes first, and the flag wins.
    return refuse_unused(parser, parser.parse_args(["--model", "", *flags]))


def main(argv: list[str] | None = None, kind: str = "ltu") -> None:
    """Serve the page until Ctrl-C or SIGTERM. `kind` is that of the newest checkpoint."""
    args = parse_args(argv)
    args.model = str(find_or_make(args.model, kind, args.llm, args.mirror))
    if args.share or args.host != LOCAL_HOST:
        print(
            "warning: everyone who has the address can use the page. With --share, all data is "
            "sent through Gradio's servers.",
            file=sys.stderr,
        )
    # End on SIGTERM as on Ctrl-C, so that uploads are removed and the counts are printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    engine = open_engine(args)
    engine.warm_up(1)
    uploads = tempfile.TemporaryDirectory(prefix="ltu_demo_", ignore_cleanup_errors=True)
    with discard_output() as terminal, uploads as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        demo = Demo(engine, args, terminal)
        page = demo.launch()
        print(f"Running on {page.local_url}", file=terminal, flush=True)
        if args.share:
            address = page.share_url or "no public address: Gradio's servers were not reached"
            print(f"Running on {address}", file=terminal, flush=True)
        page.block_thread()
        counts = [f"{count} {status}" for status, count in demo.counts.most_common()]
        print("Questions:", ", ".join(counts) or "none", file=terminal, flush=True)


if __name__ == "__main__":
    run_command(main)
