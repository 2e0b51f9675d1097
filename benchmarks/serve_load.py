"""Tests the server under load: many clients, some of them hostile, every answer checked.

    python -m benchmarks.serve_load --model DIR --output_path benchmarks/results/serve_load.json

The server is a process of its own behind loopback; the clients are OpenAI's. One client runs first,
with the same mix of requests. Answers are compared with those of the engine alone.

Valid requests are with and without a clip, plain and streamed, greedy and sampled. Invalid ones
have a clip that cannot be decoded, fields that are refused or a body that is too large, or their
client leaves in the middle of an answer. A tenth of the clients are hostile, see
`benchmarks.hostile_clients`; they have addresses of their own, which needs Linux.

Memory of the server is compared at a quarter of the time and at the end, open files before and
after. /health is measured throughout (`benchmarks.health_latency`).
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from benchmarks.hostile_clients import HostileClient, heavy_clip  # noqa: E402
from benchmarks.report import print_report, write_report  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu.files import missing_package, run_command  # noqa: E402
from ltu.inference.generation_flags import open_engine  # noqa: E402
from ltu.inference.requests import Request  # noqa: E402
from ltu.serve import read_flags  # noqa: E402

try:
    import openai  # noqa: E402
except ImportError as error:
    raise missing_package(error, "qa") from error

AUDIO = Path(__file__).parents[1] / "data" / "toy" / "audio"
QUESTIONS = [
    "What can be inferred from the audio?",
    "What is in the clip?",
    "Classify the sound.",
    "Is it loud?",
]
VALID_FRACTION = 0.8  # of the requests
NUM_STATES = 50  # measurements of memory and open files during a run
MIN_SPEEDUP = 3.0
MAX_GROWTH = 1.05  # of memory, from a quarter of the time to the end
MAX_HEALTH_MS = 100.0
HOSTILE_FRACTION = 0.1  # of the clients
GONE = "gone"  # expected result of a request whose client leaves


@dataclass
class LoadRequest:
    """A request as a client sends it, and its expected answer or code of an error."""

    body: dict
    expected: str


def audio_part(data: bytes) -> dict:
    """Return the part of a message that contains a clip."""
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "flac"},
    }


def valid_requests(model: str, tokens: int) -> list[tuple[dict, Request]]:
    """Return bodies that a client sends, each with the same request for the engine."""
    requests = []
    for number, path in enumerate(sorted(AUDIO.glob("*.flac"))[::7][:24]):
        question = QUESTIONS[number % len(QUESTIONS)]
        content = [{"type": "text", "text": question}]
        has_clip = number % 6 != 0
        clip = None
        if has_clip:
            clip = path.read_bytes()
            content.append(audio_part(clip))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
        }
        body["stream"] = number % 2 == 0
        decoding: dict = {"max_new_tokens": tokens}
        is_sampled = number % 8 == 1
        if is_sampled:
            body |= {"temperature": 0.7, "seed": number}
            decoding |= {"do_sample": True, "temperature": 0.7}
        requests.append((body, Request(question, clip, decoding=decoding, seed=number)))
    return requests


def invalid_requests(body: dict) -> list[LoadRequest]:
    """Return changes of a valid request, with the code of the error that each gets."""
    parts = {
        "unreadable": audio_part(b"RIFF, but no sound"),
        "body_too_large": audio_part(bytes(3 * 2**20)),
        "invalid_message": {"type": "image_url"},
    }
    changes: dict[str, dict] = {}
    for code, part in parts.items():
        changes[code] = {"messages": [{"role": "user", "content": [part]}]}
    changes["unsupported_parameter"] = {"n": 2}
    changes["model_not_found"] = {"model": "another"}
    changes[GONE] = {"stream": True, "max_tokens": 400}
    return [LoadRequest(body | change, code) for code, change in changes.items()]


async def send(client: openai.AsyncOpenAI, body: dict, leaves: bool = False) -> str:
    """Send a request.

    Args:
        client: the client.
        body: the request.
        leaves: close the connection after three parts of the answer.

    Returns:
        the answer, the code of the error, or GONE.
    """
    try:
        reply = await client.chat.completions.create(**body)
        if not body["stream"]:
            return reply.choices[0].message.content
        texts = []
        async for part in reply:
            texts.append(part.choices[0].delta.content or "")
            if leaves and len(texts) > 2:
                await reply.close()
                break
        if leaves:
            return GONE
        return "".join(texts)
    except openai.APIStatusError as error:
        return str(error.code or error.status_code)
    except openai.APIConnectionError:
        return "connection error"


@dataclass
class ProcessState:
    """Memory in MB and open files of a process."""

    memory_mb: float
    open_files: int


def read_state(pid: int) -> ProcessState:
    """Read the state of a process from /proc."""
    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return ProcessState(int(memory[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd")))


async def load(
    url: str,
    pid: int,
    clients: int,
    seconds: float,
    valid: list[LoadRequest],
    hostile: list[HostileClient],
) -> dict:
    """Send random requests for a while.

    Args:
        url: of the server.
        pid: process of the server.
        clients: how many clients send at the same time.
        seconds: how long they send.
        valid: the valid requests.
        hostile: clients that attack at the same time.

    Returns:
        valid requests answered per second; how many requests were answered, were refused, or ended
        otherwise than expected; connections of the hostile clients; memory and open files of the
        process; and the times of /health.
    """
    outcomes: Counter = Counter()
    invalid = invalid_requests(valid[0].body)
    states = [read_state(pid)]
    start = time.monotonic()

    async def run_client(number: int) -> None:
        rng = random.Random(number)
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300
        ) as client:
            while time.monotonic() < start + seconds:
                next_state = start + len(states) * seconds / NUM_STATES
                if number == 0 and time.monotonic() > next_state:
                    states.append(read_state(pid))
                if rng.random() < VALID_FRACTION:
                    request = rng.choice(valid)
                    outcome = "answered"
                else:
                    request = rng.choice(invalid)
                    outcome = "refused"
                result = await send(client, request.body, leaves=request.expected == GONE)
                if result != request.expected:
                    outcome = f"WRONG: {result[:50]!r}, not {request.expected[:50]!r}"
                outcomes[outcome] += 1

    attacks = [client.run(seconds) for client in hostile]
    with start_health_check(url) as health_check:
        await asyncio.gather(*(run_client(number) for number in range(clients)), *attacks)
        health, _ = health_check.communicate()
    rate = outcomes["answered"] / (time.monotonic() - start)
    time.sleep(2)  # The server needs a moment to notice that the clients are gone.
    end = read_state(pid)
    warm = states[len(states) // 4]
    connections: Counter = Counter()
    for client in hostile:
        connections += client.connections
    return {
        "answers_per_second": rate,
        "requests": outcomes,
        "hostile_connections": connections,
        "health": json.loads(health),
        "memory": {
            "before_mb": states[0].memory_mb,
            "warm_mb": warm.memory_mb,
            "end_mb": end.memory_mb,
        },
        "open_files": {"before": states[0].open_files, "end": end.open_files},
    }


def start_health_check(url: str) -> subprocess.Popen:
    """Start to measure /health; `communicate` ends it and returns the result as JSON."""
    command = [sys.executable, "-m", "benchmarks.health_latency", url]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def wait_for_server(server: subprocess.Popen, command: list[str]) -> str:
    """Return the address that the server prints.

    Raises:
        SystemExit: the server did not start.
    """
    while True:
        line = server.stderr.readline()
        if not line:
            raise SystemExit(f"The server did not start; see why with {' '.join(command)}")
        match = re.search(r"running on (http\S+)", line)
        if match:
            return match[1]


def parse_args() -> argparse.Namespace:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument("--model", required=True, help="A checkpoint folder.")
    parser.add_argument(
        "--clients", type=int, default=32, help="Number of clients at the same time."
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="Time of many clients; one client gets half."
    )
    parser.add_argument("--max_tokens", type=int, default=24, help="New tokens of an answer.")
    parser.add_argument("--max_batch", type=int, default=16, help="As of ltu.serve.")
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    flags = ["--model", args.model, "--dtype", "float32"]
    flags += ["--max_batch", str(args.max_batch), "--max_body_mb", "2"]
    num_hostile = round(args.clients * HOSTILE_FRACTION)

    # Generate the expected answers with the engine alone.
    engine = open_engine(read_flags(flags))
    valid = []
    for body, request in valid_requests(Path(args.model).resolve().name, args.max_tokens):
        valid.append(LoadRequest(body, engine([request], batch_size=1)[0].text))
    del engine

    command = [sys.executable, "-m", "ltu.serve", *flags, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = wait_for_server(server, command)
            # Read on: a server whose pipe is full would block.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            one = asyncio.run(load(url, server.pid, 1, args.seconds / 2, valid, []))
            heavy = heavy_clip()
            hostile = [
                HostileClient(url, number, valid[0].body, heavy) for number in range(num_hostile)
            ]
            honest = args.clients - num_hostile
            many = asyncio.run(load(url, server.pid, honest, args.seconds, valid, hostile))
        finally:
            server.terminate()

    speedup = many["answers_per_second"] / one["answers_per_second"]
    is_right = set(one["requests"]) | set(many["requests"]) <= {"answered", "refused"}
    memory = many["memory"]
    files = many["open_files"]
    leaks = memory["end_mb"] > memory["warm_mb"] * MAX_GROWTH or files["end"] > files["before"]
    health = many["health"]
    is_healthy = health["failed"] == 0 and health["max_ms"] < MAX_HEALTH_MS
    report = {
        "model": args.model,
        "clients": args.clients,
        "hostile_clients": num_hostile,
        "seconds": args.seconds,
        "max_tokens": args.max_tokens,
        "max_batch": args.max_batch,
        "torch_threads": torch.get_num_threads(),
        "one_client": one,
        "many_clients": many,
        "speedup": speedup,
        "is_right": is_right,
        "leaks": leaks,
        "is_healthy": is_healthy,
    }
    print_report(report)
    answers = "right" if is_right else "WRONG"
    leak = "LEAKS" if leaks else "no leak"
    print(
        f"answers {answers}, {leak}, /health at most {health['max_ms']:.0f} ms (allowed: "
        f"{MAX_HEALTH_MS:.0f}), {health['failed']} failed, "
        f"{speedup:.1f} x one client's throughput (needed: {MIN_SPEEDUP})"
    )
    write_report(report, args.output_path)
    return int(not is_right or leaks or not is_healthy or speedup < MIN_SPEEDUP)


if __name__ == "__main__":
    run_command(main)
