"""Measures time and memory of a command of this repository."""

import os
import subprocess
import sys
import time


def measure_command(command: list[str]) -> dict[str, float]:
    """Run `python -m ...`: wall-clock and processor seconds, and the peak of resident memory in MB.

    Raises:
        RuntimeError: the command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    expected = [0]
    if command[0] == "data.validate":
        expected = [0, 1]  # 1: it found something.
    if process.returncode not in expected:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "processor": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }
