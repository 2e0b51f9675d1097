"""Measures how long a server's /health takes, each time over a new connection, until stdin ends.

    python -m benchmarks.health_latency http://127.0.0.1:8000

It is a process of its own, so that the clients of a load test do not slow it down. It prints the
largest and the mean time, and the number of requests that failed.
"""

import argparse
import json
import os
import select
import sys
import time
import urllib.error
import urllib.request

from ltu.files import run_command

PAUSE = 0.05  # seconds between two requests
TIMEOUT = 10.0  # seconds until a request has failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="Address of the server.")
    url = parser.parse_args().url
    seconds: list[float] = []
    failed = 0
    while not has_ended():
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=TIMEOUT) as reply:
                reply.read()
        except (OSError, urllib.error.URLError):
            failed += 1
        seconds.append(time.perf_counter() - start)
    summary = {
        "requests": len(seconds),
        "failed": failed,
        "mean_ms": 1000 * sum(seconds) / len(seconds),
        "max_ms": 1000 * max(seconds),
    }
    print(json.dumps(summary))


def has_ended() -> bool:
    """Wait for a pause; return whether stdin ended in it."""
    readable, _, _ = select.select([sys.stdin], [], [], PAUSE)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    run_command(main)
