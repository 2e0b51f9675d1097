"""Size and speed of the feature store beside the original's compressed npz.

    python -m benchmarks.feature_store --whisper WHISPER.pt --output_path exp/benchmarks/feature_store.json

Notable:
- a clip is (32, 25, 1280) as that of Whisper large: filled from a smaller Whisper's features of real clips, because
  random numbers have other exponents;
- both sides read from the page cache, in turns, and write without waiting for the disk.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ltu.data.audio import load_audio  # noqa: E402
from ltu_as import LtuAsFeatureExtractor  # noqa: E402
from ltu_as.feature_store import FeatureStore  # noqa: E402

SHAPE = (32, 25, 1280)
MIN_READ = 5.0  # times the original's
AUDIO = Path(__file__).parents[1] / "data" / "toy" / "audio"


def real_features(whisper: str, clips: int) -> list[np.ndarray]:
    """float32 of SHAPE, each from other sounds: layers of several clips below and beside each other."""
    extractor = LtuAsFeatureExtractor(None, None, whisper, None, "fp32")
    layers, _, width = extractor.describe()["shape"]
    across = -(-SHAPE[2] // width)
    needed = across * -(-SHAPE[0] // layers)
    paths = sorted(AUDIO.glob("*.flac"))
    paths = paths[:: max(1, len(paths) // (needed + clips))][: needed + clips]
    pieces = [extractor(load_audio(path)).input_features[0].numpy() for path in paths]
    found = []
    for first in range(clips):
        chosen = pieces[first : first + needed]
        columns = [np.concatenate(chosen[column::across])[: SHAPE[0]] for column in range(across)]
        found.append(np.ascontiguousarray(np.concatenate(columns, 2)[:, :, : SHAPE[2]]))
    return found


def rate(run: Callable[[int], object], clips: int, rounds: int) -> float:
    """Clips a second in the best of a few rounds after a first one: what else runs on the machine only slows."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for number in range(clips):
            run(number)
        times.append(time.perf_counter() - start)
    return clips / min(times[1:])


def compare(features: list[np.ndarray], dtype: str, rounds: int) -> dict:
    arrays = [clip.astype(dtype) for clip in features]
    tensors = [torch.from_numpy(array) for array in arrays]
    with tempfile.TemporaryDirectory() as folder:
        description = {
            "whisper_model": "large",
            "fingerprint": "",
            "feature_precision": dtype,
            "shape": list(SHAPE),
        }
        store = FeatureStore.create(f"{folder}/ours", description)
        npz = [Path(folder) / f"{number}.npz" for number in range(len(arrays))]
        runs = {
            "write": (
                lambda number: np.savez_compressed(npz[number], arrays[number]),
                lambda number: store.write(str(number), tensors[number], "", 10.0),
            ),
            "read": (
                lambda number: np.load(npz[number])["arr_0"],
                lambda number: store.read(str(number)),
            ),
        }
        report: dict = {"npz": {}, "ours": {}}
        for name, both in runs.items():
            for side, run in zip(report, both, strict=True):
                report[side][f"{name}s_per_second"] = round(rate(run, len(arrays), rounds), 1)
        report["npz"]["bytes"] = int(np.mean([path.stat().st_size for path in npz]))
        sizes = [store.path_of(str(number)).stat().st_size for number in range(len(arrays))]
        report["ours"]["bytes"] = int(np.mean(sizes))
        if not all(
            torch.equal(store.read(str(number)).features, clip)
            for number, clip in enumerate(tensors)
        ):
            raise AssertionError("what was read is not what was written")
    ratio = {name: report["ours"][name] / report["npz"][name] for name in report["npz"]}
    return report | {"ours_over_npz": {name: round(value, 3) for name, value in ratio.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--whisper", required=True, help="an openai-whisper .pt file or a name; base is enough"
    )
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output_path")
    args = parser.parse_args()
    torch.set_num_threads(1)
    features = real_features(args.whisper, args.clips)
    report = {dtype: compare(features, dtype, args.rounds) for dtype in ("float32", "float16")}
    print(json.dumps(report, indent=1))
    for dtype, found in report.items():
        ratio = found["ours_over_npz"]
        is_enough = ratio["reads_per_second"] >= MIN_READ and ratio["bytes"] <= 1
        print(f"{dtype}: reads {ratio['reads_per_second']:.1f} x as fast, {ratio['bytes']:.2f} of the bytes: "
              f"{'reaches' if is_enough else 'falls short of'} {MIN_READ} x at no more bytes")  # fmt: skip
    if args.output_path:
        Path(args.output_path).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output_path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
