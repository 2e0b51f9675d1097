"""Measures how long the clients of a loaded server wait: for the first text and for the last.

    python -m benchmarks.serve_wait --output_path benchmarks/results/serve_wait_cpu.json
    python -m benchmarks.serve_wait --flags "--tokens_per_turn 0" "--tokens_per_turn 16"
    git worktree add ../before COMMIT
    python -m benchmarks.serve_wait --before ../before

There are three loads: all clients ask for few new tokens, all for many, or every second one for
each. A client sends its next request when its answer is complete. Answers are sampled and streamed,
and have exactly as many tokens as the request allows. The weights are random (speed does not depend
on them): a Llama of `--hidden_size` x `--layers` with 512 tokens, and the paper's CAV-MAE.

Servers with different flags, and those of another source tree, alternate: each gets the three
loads, then the next one, `--rounds` times. The report has the median and the 95th percentile, over
the requests of a kind, of the seconds to the first text and to the end.
"""

import argparse
import asyncio
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# On a shared machine, spinning threads would also measure the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from benchmarks.device import default_device, device_name, parse_device  # noqa: E402
from benchmarks.questions_per_second import QUESTIONS, TOKENIZER  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.serve_load import AUDIO, audio_part, wait_for_server  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu import (  # noqa: E402
    CavMaeConfig,
    LtuConfig,
    LtuForConditionalGeneration,
    LtuProcessor,
)
from ltu.files import missing_package, run_command  # noqa: E402

try:
    import openai  # noqa: E402
except ImportError as error:
    raise missing_package(error, "qa") from error

NAME = "wait"  # The model's name for clients.
NUM_CLIPS = 4
FEW_TOKENS = 16
MANY_TOKENS = 400


@dataclass
class Wait:
    """How long a client waited for an answer, in seconds.

    Attributes:
        max_tokens: the number of new tokens.
        first: until the first text.
        last: until the end.
    """

    max_tokens: int
    first: float
    last: float


@dataclass(frozen=True)
class Arm:
    """A server to measure.

    Args:
        name: for the report.
        tree: the source tree.
        flags: of `ltu.serve`.
    """

    name: str
    tree: Path
    flags: list[str]


def write_model(folder: Path, hidden_size: int, layers: int) -> None:
    """Write a checkpoint folder with random weights, whose answers do not end by themselves."""
    torch.manual_seed(0)
    text_config = LlamaConfig(
        vocab_size=512,  # That of the tokenizer: any other token has no text.
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        dtype="float32",
    )
    config = LtuConfig(audio_config=CavMaeConfig(), text_config=text_config)
    processor = LtuProcessor.from_config(config, TOKENIZER)
    model = LtuForConditionalGeneration(config)
    # No token of the vocabulary, so it is never generated.
    model.generation_config.eos_token_id = model.config.audio_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


async def send(client: openai.AsyncOpenAI, body: dict) -> Wait:
    """Send a request and read its answer."""
    start = time.monotonic()
    first = None
    async for part in await client.chat.completions.create(**body):
        if first is None and part.choices and part.choices[0].delta.content:
            first = time.monotonic() - start
    last = time.monotonic() - start
    return Wait(body["max_tokens"], last if first is None else first, last)


def make_body(number: int, max_tokens: int, clips: list[bytes]) -> dict:
    """Return the body of a request; every second one has a clip."""
    content = [{"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    if number % 4 < 2:
        content.append(audio_part(clips[number % len(clips)]))
    messages = [{"role": "user", "content": content}]
    body = {"model": NAME, "messages": messages, "max_tokens": max_tokens, "stream": True}
    return body | {"temperature": 1.0, "seed": number}


async def run_load(url: str, tokens_of_clients: list[int], num_short: int) -> list[Wait]:
    """Run clients at the same time.

    Args:
        url: of the server.
        tokens_of_clients: the number of new tokens that each client asks for.
        num_short: requests of a client that asks for few; any other has one request.
    """
    clips = [path.read_bytes() for path in sorted(AUDIO.glob("*.flac"))[:NUM_CLIPS]]
    waits = []

    async def run_client(number: int) -> None:
        max_tokens = tokens_of_clients[number]
        num_requests = num_short if max_tokens == FEW_TOKENS else 1
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=3600
        ) as client:
            for turn in range(num_requests):
                body = make_body(number + turn, max_tokens, clips)
                waits.append(await send(client, body))

    # Encode the clips before, since each server caches them.
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=3600) as client:
        for number in range(2 * NUM_CLIPS):
            await send(client, make_body(number, 1, clips))
    await asyncio.gather(*(run_client(number) for number in range(len(tokens_of_clients))))
    return waits


def summarize(waits: list[Wait]) -> dict:
    """Return median and 95th percentile of the waits for each number of tokens."""
    summary: dict = {}
    for max_tokens in sorted({wait.max_tokens for wait in waits}):
        own = [wait for wait in waits if wait.max_tokens == max_tokens]
        figures = {"requests": len(own)}
        for name in ("first", "last"):
            seconds = [getattr(wait, name) for wait in own]
            figures[f"{name}_median"] = round(statistics.median(seconds), 2)
            figures[f"{name}_p95"] = round(statistics.quantiles(seconds, n=20)[-1], 2)
        summary[str(max_tokens)] = figures
    return summary


def measure(arm: Arm, model: Path, args: argparse.Namespace) -> dict[str, list[Wait]]:
    """Start a server, run each load, and return its waits."""
    few = [FEW_TOKENS] * args.clients
    many = [MANY_TOKENS] * args.clients
    mixed = [FEW_TOKENS, MANY_TOKENS] * (args.clients // 2)
    loads = {"few": few, "many": many, "mixed": mixed}
    command = [sys.executable, "-m", "ltu.serve", "--model", str(model), "--name", NAME]
    command += ["--device", args.device, "--dtype", "float32", "--port", "0", "--timeout", "3600"]
    command += arm.flags
    waits = {}
    environment = os.environ | {"PYTHONPATH": str(arm.tree)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=arm.tree, env=environment
    ) as server:
        try:
            url = wait_for_server(server, command)
            # Read on: a server whose pipe is full would block.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            for name in args.loads:
                waits[name] = asyncio.run(run_load(url, loads[name], args.short_requests))
        finally:
            server.terminate()
    return waits


def make_arms(args: argparse.Namespace) -> list[Arm]:
    here = Path(__file__).parents[1]
    arms = []
    if args.before is not None:
        arms.append(Arm("before", args.before.absolute(), []))
    for flags in args.flags:
        arms.append(Arm(flags or "default", here, shlex.split(flags)))
    return arms


def print_line(server: str, load: str, summary: dict) -> None:
    """Print a line for each number of tokens of a load."""
    for tokens, figures in summary.items():
        first = f"first {figures['first_median']:.2f}, {figures['first_p95']:.2f}"
        last = f"last {figures['last_median']:.2f}, {figures['last_p95']:.2f}"
        print(f"{server} | {load} | {tokens} tokens | {first} | {last}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument("--clients", type=int, default=32, help="Clients at the same time.")
    parser.add_argument("--hidden_size", type=int, default=256, help="Of the language model.")
    parser.add_argument("--layers", type=int, default=4, help="Of the language model.")
    parser.add_argument("--rounds", type=int, default=1, help="Measurements of each server.")
    parser.add_argument(
        "--short_requests", type=int, default=4, help="Requests of a client that asks for few."
    )
    parser.add_argument(
        "--loads",
        nargs="+",
        default=["few", "many", "mixed"],
        choices=["few", "many", "mixed"],
        help="The loads to measure.",
    )
    parser.add_argument(
        "--flags", nargs="+", default=[""], help="Flags of each server, as one word each."
    )
    parser.add_argument("--before", type=Path, help="Another source tree, measured too.")
    parser.add_argument("--device", type=parse_device, default=default_device(), help="Device.")
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    arms = make_arms(args)
    waits: dict[str, dict[str, list[Wait]]] = {arm.name: {} for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.hidden_size, args.layers)
        for _ in range(args.rounds):
            for arm in arms:
                for load, found in measure(arm, Path(folder), args).items():
                    print_line(arm.name, load, summarize(found))
                    waits[arm.name].setdefault(load, []).extend(found)
    print("all rounds, seconds, median and 95th percentile:")
    servers: dict[str, dict] = {}
    for name, loads in waits.items():
        servers[name] = {}
        for load, found in loads.items():
            servers[name][load] = summarize(found)
            print_line(name, load, servers[name][load])
    report = {
        "device": device_name(args.device),
        "hidden_size": args.hidden_size,
        "layers": args.layers,
        "clients": args.clients,
        "rounds": args.rounds,
        "servers": servers,
    }
    write_report(report, args.output_path)


if __name__ == "__main__":
    run_command(main)
