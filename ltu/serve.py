"""Answer over HTTP as OpenAI's chat completions do, so that its clients work as they are.

    python -m ltu.serve --model DIR            then, in a client, base_url="http://127.0.0.1:8000/v1"

Notable:
- A message may hold a clip, {"type": "input_audio", "input_audio": {"data": base64, "format": "wav", "mp3" or "flac"}}.
- Without `temperature` answers are greedy, as those of the other commands (OpenAI's are sampled); 0 is greedy too.
  Above 0 they are sampled, without a `seed` from a new one each, which the reply tells.
- Of ours: `transcript`, `mode`, `num_chunks`, `top_k`, `repetition_penalty` in a request; "ltu" (status, seconds heard and
  more) in a reply. A clip that cannot be heard is a 400 whose `code` is its status.
- What would change an answer and is not supported is refused. Nothing that a request names is opened; only counts are
  logged. Where the environment sets LTU_API_KEY, /v1 asks for it; /health and /metrics are open.
"""

import argparse

import numpy as np

from ltu.data.audio import SAMPLING_RATE
from ltu.files import run_command
from ltu.inference.generation_flags import add_generation_flags, open_engine, refuse_unused
from ltu.inference.requests import Request
from ltu.serving.openai_server import FLAGS, make_server


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add_generation_flags(parser)
    for name, (default, text) in FLAGS.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})"
        )
    args = refuse_unused(parser, parser.parse_args(argv))
    if (args.max_new_tokens or 0) > args.max_tokens:
        parser.error(
            f"--max_new_tokens {args.max_new_tokens} is more than --max_tokens {args.max_tokens}"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    engine = open_engine(args)
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLING_RATE).astype(np.float32)
    engine(
        [Request("?", noise)], max_new_tokens=1
    )  # What is missing shows now, and the first client waits less.
    make_server(engine, args).run()


if __name__ == "__main__":
    run_command(main)
