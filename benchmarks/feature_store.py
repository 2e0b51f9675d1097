"""Measures size and speed of the feature store, compared with the compressed npz of the original.

    python -m benchmarks.feature_store --whisper WHISPER.pt --output_path exp/feature_store.json

The features of a clip have the shape (32, 25, 1280) of Whisper large. They are assembled from the
features of real clips by a smaller Whisper, because random numbers have other exponents.

Both sides read from the page cache, alternately, and write without waiting for the disk. A check
finds out whether the sound of a clip has changed; the sound is 10 s of 16-bit audio.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.report import print_report, write_report  # noqa: E402
from data.command_line import command_parser  # noqa: E402
from ltu.data.audio import load_audio  # noqa: E402
from ltu.files import FileRecord, run_command  # noqa: E402
from ltu_as import LtuAsFeatureExtractor  # noqa: E402
from ltu_as.feature_store import FeatureStore  # noqa: E402

SHAPE = (32, 25, 1280)  # layers, time, width
SOUND_BYTES = 320_044  # 10 s of 16-bit audio at 16 kHz
MIN_READ = 5.0  # reading speed / that of the original
AUDIO = Path(__file__).parents[1] / "data" / "toy" / "audio"


def real_features(whisper: str, clips: int) -> list[np.ndarray]:
    """Return float32 arrays of SHAPE, each made of the features of other toy clips.

    Features of several clips are stacked along the layers and along the width.
    """
    extractor = LtuAsFeatureExtractor(None, None, whisper, None, "fp32")
    layers, _, width = extractor.describe()["shape"]
    across = math.ceil(SHAPE[2] / width)
    needed = across * math.ceil(SHAPE[0] / layers)
    paths = sorted(AUDIO.glob("*.flac"))
    step = max(1, len(paths) // (needed + clips))
    paths = paths[::step][: needed + clips]
    pieces = []
    for path in paths:
        pieces.append(extractor(load_audio(path)).input_features[0].numpy())
    features = []
    for first in range(clips):
        chosen = pieces[first : first + needed]
        columns = []
        for column in range(across):
            columns.append(np.concatenate(chosen[column::across])[: SHAPE[0]])
        stacked = np.concatenate(columns, 2)[:, :, : SHAPE[2]]  # SHAPE
        features.append(np.ascontiguousarray(stacked))
    return features


def measure_rate(run: Callable[[int], object], clips: int, rounds: int) -> float:
    """Return clips per second in the best round after a warm-up.

    The best round counts because other processes on the machine can only slow a round down.
    """
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for number in range(clips):
            run(number)
        times.append(time.perf_counter() - start)
    return clips / min(times[1:])


def compare(features: list[np.ndarray], dtype: str, rounds: int) -> dict:
    """Measure both sides on features of one dtype.

    Raises:
        AssertionError: what the store reads is not what was written.
    """
    arrays = [clip.astype(dtype) for clip in features]
    tensors = [torch.from_numpy(array) for array in arrays]
    count = len(arrays)
    with tempfile.TemporaryDirectory() as folder:
        description = {
            "whisper_model": "large",
            "fingerprint": "",
            "feature_precision": dtype,
            "shape": list(SHAPE),
        }
        store = FeatureStore.create(f"{folder}/ours", description)

        def npz_path(number: int) -> Path:
            return Path(folder) / f"{number}.npz"

        def write_npz(number: int) -> None:
            np.savez_compressed(npz_path(number), arrays[number])

        def sound_path(number: int) -> Path:
            return Path(folder) / f"{number}.wav"

        for number in range(count):
            sound_path(number).write_bytes(os.urandom(SOUND_BYTES))
        sources = [FileRecord.of(sound_path(number)) for number in range(count)]

        def write_ours(number: int) -> None:
            store.write(str(number), tensors[number], "", 10.0, sources[number])

        def check_ours(number: int) -> None:
            store.check_current(str(number), sound_path(number))

        def read_npz(number: int) -> np.ndarray:
            return np.load(npz_path(number))["arr_0"]

        def read_ours(number: int) -> object:
            return store.read(str(number))

        report: dict = {"npz": {}, "ours": {}}
        for side, name, run in (
            ("npz", "writes_per_second", write_npz),
            ("ours", "writes_per_second", write_ours),
            ("npz", "reads_per_second", read_npz),
            ("ours", "reads_per_second", read_ours),
            ("ours", "checks_per_second", check_ours),
        ):
            report[side][name] = round(measure_rate(run, count, rounds), 1)
        npz_bytes = 0
        our_bytes = 0
        for number, clip in enumerate(tensors):
            npz_bytes += npz_path(number).stat().st_size
            our_bytes += store.path_of(str(number)).stat().st_size
            if not torch.equal(store.read(str(number)).features, clip):
                raise AssertionError("what was read is not what was written")
        report["npz"]["bytes"] = npz_bytes // count
        report["ours"]["bytes"] = our_bytes // count
    ratios = {}
    for name, value in report["npz"].items():
        ratios[name] = round(report["ours"][name] / value, 3)
    return report | {"ours_over_npz": ratios}


def main() -> int:
    parser = command_parser(__doc__, data_path=None, output_path=None)
    parser.add_argument(
        "--whisper",
        required=True,
        help="An openai-whisper .pt file, or the name of a model; base is enough.",
    )
    parser.add_argument("--clips", type=int, default=8, help="Number of clips.")
    parser.add_argument(
        "--rounds", type=int, default=5, help="Measurements of each side; the best one counts."
    )
    parser.add_argument("--output_path", type=Path, help="Write the report there as JSON.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    features = real_features(args.whisper, args.clips)
    report = {}
    for dtype in ("float32", "float16"):
        report[dtype] = compare(features, dtype, args.rounds)
    print_report(report)
    is_enough = True
    for dtype, result in report.items():
        reads = result["ours_over_npz"]["reads_per_second"]
        size = result["ours_over_npz"]["bytes"]
        verdict = "reaches"
        if reads < MIN_READ or size > 1:
            verdict = "falls short of"
            is_enough = False
        print(
            f"{dtype}: reads {reads:.1f} x as fast, {size:.2f} of the bytes: "
            f"{verdict} {MIN_READ} x at no more bytes"
        )
    write_report(report, args.output_path)
    return int(not is_enough)


if __name__ == "__main__":
    run_command(main)
