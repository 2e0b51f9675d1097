"""Load test of the server: many clients, good and bad requests mixed, every good answer compared with the engine alone.

    python -m benchmarks.serve_load --model DIR --output_path benchmarks/results/serve_load.json

Notable:
- the server is a process of its own behind loopback, the clients are OpenAI's; one client first, with the same mix;
- good requests: with and without a clip, plain and streamed, greedy and sampled; bad ones: a clip that cannot be heard,
  fields that are refused, a body that is too large, clients that leave in the middle of an answer;
- memory of the server is compared at a quarter of the time and after it, open files before and after.
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
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import openai  # noqa: E402
import torch  # noqa: E402

from ltu.inference.generation_flags import open_engine  # noqa: E402
from ltu.inference.requests import Request  # noqa: E402
from ltu.serve import read_flags  # noqa: E402

AUDIO = Path(__file__).parents[1] / "data" / "toy" / "audio"
QUESTIONS = [
    "What can be inferred from the audio?",
    "What do you hear?",
    "Classify the sound.",
    "Is it loud?",
]
MIN_SPEEDUP = 3.0
MAX_GROWTH = 1.05  # of memory, from a quarter of the time to the end


def sound(data: bytes) -> dict:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "flac"},
    }


def good_requests(model: str, tokens: int) -> list[tuple[dict, Request]]:
    """What a client sends, and the same for the engine."""
    made = []
    for number, path in enumerate(sorted(AUDIO.glob("*.flac"))[::7][:24]):
        clip, question = None if number % 6 == 0 else path.read_bytes(), QUESTIONS[number % 4]
        sampling = {"temperature": 0.7, "seed": number} if number % 8 == 1 else {}
        content = [{"type": "text", "text": question}] + ([] if clip is None else [sound(clip)])
        said = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
        }
        decoding = {"do_sample": True, "temperature": 0.7} if sampling else {}
        request = Request(
            question, clip, decoding=decoding | {"max_new_tokens": tokens}, seed=number
        )
        made.append((said | sampling | {"stream": number % 2 == 0}, request))
    return made


def bad_requests(said: dict) -> list[tuple[dict, str]]:
    """Requests with the code of the error that each gets; "gone": its client leaves."""
    parts = {"unreadable": sound(b"RIFF, but no sound"), "body_too_large": sound(bytes(3 * 2**20))}
    parts |= {"invalid_message": {"type": "image_url"}}
    wrong = {
        code: {"messages": [{"role": "user", "content": [part]}]} for code, part in parts.items()
    }
    wrong |= {"unsupported_parameter": {"n": 2}, "model_not_found": {"model": "another"}}
    return [
        (said | more, code)
        for code, more in (wrong | {"gone": {"stream": True, "max_tokens": 400}}).items()
    ]


async def send(client: openai.AsyncOpenAI, said: dict, is_left: bool = False) -> str:
    """The answer, or the code of the error."""
    try:
        reply = await client.chat.completions.create(**said)
        if not said["stream"]:
            return reply.choices[0].message.content
        texts = []
        async for part in reply:
            texts.append(part.choices[0].delta.content or "")
            if is_left and len(texts) > 2:
                await reply.close()
                break
        return "gone" if is_left else "".join(texts)
    except openai.APIStatusError as error:
        return str(error.code or error.status_code)


async def load(
    url: str, pid: int, clients: int, seconds: float, good: list[tuple[dict, str]]
) -> dict:
    """Counts of requests that ended as they should and of others, good ones a second, and what the process held."""
    tally: Counter = Counter()
    bad = bad_requests(good[0][0])
    start, looks = time.monotonic(), [look(pid)]

    async def work(number: int) -> None:
        rng = random.Random(number)
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=300
        ) as client:
            while time.monotonic() < start + seconds:
                if number == 0 and time.monotonic() > start + len(looks) * seconds / 50:
                    looks.append(look(pid))
                is_good = rng.random() < 0.8
                said, expected = rng.choice(good if is_good else bad)
                found = await send(client, said, expected == "gone")
                right = "answered" if is_good else "refused"
                tally[
                    right if found == expected else f"WRONG: {found[:50]!r}, not {expected[:50]!r}"
                ] += 1

    await asyncio.gather(*(work(number) for number in range(clients)))
    rate = tally["answered"] / (time.monotonic() - start)
    time.sleep(2)  # Until the server has seen that they are gone.
    memory = {"warm_mb": looks[len(looks) // 4][0], "end_mb": look(pid)[0]}
    files = {"before": looks[0][1], "end": look(pid)[1]}
    return {"answers_per_second": rate, "requests": tally, "memory": memory, "open_files": files}


def look(pid: int) -> tuple[float, int]:
    """Memory in MB and open files of a process."""
    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(memory[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="of many clients; one gets half")
    parser.add_argument("--max_tokens", type=int, default=24)
    parser.add_argument("--max_batch", type=int, default=16)
    parser.add_argument("--output_path")
    args = parser.parse_args()
    flags = [
        "--model",
        args.model,
        "--dtype",
        "float32",
        "--max_batch",
        str(args.max_batch),
        "--max_body_mb",
        "2",
    ]
    engine = open_engine(read_flags(flags))
    made = good_requests(Path(args.model).resolve().name, args.max_tokens)
    good = [(said, engine([request], batch_size=1)[0].text) for said, request in made]
    del engine
    command = [sys.executable, "-m", "ltu.serve", *flags, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            while not (
                found := re.search(r"running on (http\S+)", line := server.stderr.readline())
            ):
                if not line:
                    raise SystemExit(f"The server did not start; see why with {' '.join(command)}")
            threading.Thread(target=server.stderr.read, daemon=True).start()
            one = asyncio.run(load(found[1], server.pid, 1, args.seconds / 2, good))
            many = asyncio.run(load(found[1], server.pid, args.clients, args.seconds, good))
        finally:
            server.terminate()
    output_path = vars(args).pop("output_path")
    report = vars(args) | {
        "torch_threads": torch.get_num_threads(),
        "one_client": one,
        "many_clients": many,
    }
    report["speedup"] = many["answers_per_second"] / one["answers_per_second"]
    report["is_right"] = set(one["requests"]) | set(many["requests"]) <= {"answered", "refused"}
    memory, files = many["memory"], many["open_files"]
    report["leaks"] = (
        memory["end_mb"] > memory["warm_mb"] * MAX_GROWTH or files["end"] > files["before"]
    )
    print(json.dumps(report, indent=1))
    print(f"answers {'right' if report['is_right'] else 'WRONG'}, {'LEAKS' if report['leaks'] else 'no leak'}, "
          f"{report['speedup']:.1f} x one client's throughput (needed: {MIN_SPEEDUP})")  # fmt: skip
    if output_path:
        Path(output_path).parent.mkdir(parents=True, exist_ok=True)
        Path(output_path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not report["is_right"] or report["leaks"] or report["speedup"] < MIN_SPEEDUP)


if __name__ == "__main__":
    sys.exit(main())
