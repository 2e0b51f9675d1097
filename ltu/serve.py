"""Serves a model through the chat completions API of OpenAI, for its unmodified clients.

    python -m ltu.serve --model DIR      then, in a client, base_url="http://127.0.0.1:8000/v1"

A message may contain a clip as a part
{"type": "input_audio", "input_audio": {"data": base64, "format": "wav", "mp3", "flac" or "ogg"}},
where data may also be a `data:` URL.

/docs documents all fields of requests and replies. Without `temperature`, or with 0, decoding is
greedy, as in the other commands (OpenAI's server samples by default). Above 0 tokens are sampled;
without a `seed` each request gets another one, which the reply contains.

A request may also have `transcript`, `mode`, `num_chunks`, `top_k` and `repetition_penalty`. A
reply also has "ltu": status, warnings, seconds of audio that were used, and more. For a clip that
cannot be decoded the reply is a 400, and its `code` is the status.

A field that would change an answer and is not supported is refused. Nothing that a request names is
opened. The log has no text, address or name of a request: only types and places of errors, and the
first warning about a clip of each kind, by its size. If the environment variable LTU_API_KEY is
set, /v1 requires that key; /health, /metrics and /docs are open.

Connections that send nothing or send slowly keep nobody out: if there are too many, those that have
waited longest without a complete request are closed, and each request must arrive in time. A client
is the address of the peer; headers such as X-Forwarded-For are not used.
"""

import argparse
import gc

import numpy as np

from ltu.data.audio import SAMPLING_RATE
from ltu.files import run_command
from ltu.inference.generation_flags import (
    add_generation_flags,
    open_engine,
    read_decoding_flags,
    refuse_unused,
)
from ltu.inference.requests import Request
from ltu.inference.sampling import check_decoding
from ltu.serving.connection_limits import limits_of_flags, raise_file_limit
from ltu.serving.listener import open_listeners, warn_if_open
from ltu.serving.openai_server import api_key, make_server

# The smallest values of flags that are numbers.
SMALLEST = {
    "port": 0,
    "max_batch": 1,
    "max_wait_ms": 0,
    "tokens_per_turn": 0,
    "paused_cache_mb": 0,
    "max_queue": 1,
    "max_connections": 1,
    "max_connections_per_client": 0,
    "receive_seconds": 0,
    "max_body_mb": 0,
    "max_characters": 1,
    "max_seconds": 0,
    "max_tokens": 1,
    "timeout": 0,
    "shutdown_seconds": 0,
}


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags; exits with 2 and a message if one is unknown or impossible."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_generation_flags(parser)
    add_server_flags(parser)
    args = refuse_unused(parser, parser.parse_args(argv))
    for name, smallest in SMALLEST.items():
        value = getattr(args, name)
        if not value >= smallest:  # Also if it is not a number (nan).
            parser.error(f"--{name} {value}: it must be at least {smallest}")
    if (args.max_new_tokens or 0) > args.max_tokens:
        parser.error(
            f"--max_new_tokens {args.max_new_tokens} is more than --max_tokens {args.max_tokens}"
        )
    return args


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the address, the batches and the limits."""

    def add(name: str, default: str | int | float, text: str) -> None:
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)

    add(
        "host",
        "127.0.0.1",
        "Address to bind. Set LTU_API_KEY before you make it reachable for others.",
    )
    add("port", 8000, "Port to bind; 0 selects a free one.")
    add("name", "", "Name of the model for clients; by default that of its folder.")
    add("max_batch", 8, "Maximum number of requests in a batch.")
    add(
        "max_wait_ms",
        20.0,
        "Maximum time in milliseconds that a batch waits for requests that have arrived, and whose "
        "clips are decoded.",
    )
    add(
        "tokens_per_turn",
        32,
        "New tokens after which the answers of a batch are paused if other requests wait; they "
        "continue after these. 0: a batch runs to the end of its longest answer. Fewer tokens "
        "shorten the wait for the first text, and cost up to a tenth of the time of generation.",
    )
    add(
        "paused_cache_mb",
        1024.0,
        "Maximum size of the key-value caches of paused requests in MiB, on the device of the "
        "model; beyond it they are computed again.",
    )
    add(
        "max_queue",
        64,
        "Maximum number of complete requests at the same time; more get a 429.",
    )
    add(
        "max_connections",
        256,
        "Maximum number of connections; fewer if the limit of open files is lower. At the limit, "
        "the one that has waited longest without a complete request is closed for a new one.",
    )
    add(
        "max_connections_per_client",
        100,
        "The same for the connections of one address; 0 for no limit, as it is needed behind a "
        "reverse proxy, whose address is that of all clients.",
    )
    add(
        "receive_seconds",
        30.0,
        "Seconds in which the first byte of a request must arrive, and then all of its headers and "
        "body, and in which a client must read what it is sent.",
    )
    add("max_body_mb", 25.0, "Maximum size of a request's body in MiB.")
    add("max_characters", 100_000, "Maximum length of a prompt in characters.")
    add("max_seconds", 300.0, "Maximum length of a clip in seconds.")
    add("max_tokens", 1024, "Maximum number of new tokens that a request may demand.")
    add("timeout", 300.0, "Seconds until a request that has arrived is cancelled.")
    add("shutdown_seconds", 30, "Seconds that running requests get to finish after SIGTERM.")


def main(argv: list[str] | None = None) -> None:
    args = read_flags(argv)
    raise_file_limit()
    limits = limits_of_flags(args)
    listeners = open_listeners(args.host, args.port)
    warn_if_open(listeners, api_key())
    engine = open_engine(args)
    # Answer a question about noise, so that a missing part shows now and the first client waits
    # less.
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLING_RATE).astype(np.float32)
    engine([Request("?", noise)], max_new_tokens=1)
    # A request that names no limit has this one.
    engine.warm_up(args.max_batch, check_decoding(read_decoding_flags(args))["max_new_tokens"])
    server = make_server(engine, args, limits)
    # Leave what exists now to the end of the process. Otherwise the garbage collector looks through
    # it now and then, which takes half a second in which nothing is answered.
    gc.collect()
    gc.freeze()
    server.run(sockets=listeners)


if __name__ == "__main__":
    run_command(main)
