"""Features and transcripts of the clips of rows, kept in a folder.

    python -m ltu_as.extract_whisper_feature --data_path ROWS.json --output_dir DIR --model CHECKPOINT
    python -m ltu_as.extract_whisper_feature --data_path A.json B.json --output_dir DIR --whisper large-v1
    torchrun --nproc_per_node 4 -m ltu_as.extract_whisper_feature ...        the same files, on four GPUs

Stop it at any time and run it again: it goes on. Batches are cut from the list of all clips, whatever is there already
and however many processes share them, so that the files are the same to the bit. `summary.json` in the folder says which
clips failed and why; exits with 1 when they are more than `--max_bad`.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoProcessor

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.data.audio import SAMPLING_RATE, AudioError, load_audio
from ltu.data.dataset_parser import RowError
from ltu.data.examples import read_rows
from ltu.files import replace_file, run_command
from ltu.models.checkpoint_folder import CHECKPOINT_FILES, find_checkpoint
from ltu_as.feature_extraction_ltu_as import TEXT_MODELS, LtuAsFeatureExtractor
from ltu_as.feature_store import FeatureStore

SETTINGS = ("transcription_model", "feature_precision", "language")


def clips_of(rows: list[dict], transcribe: str) -> dict[str, tuple[str, bool]]:
    """audio_id -> its path and whether a transcript is wanted, in the order of the rows.

    Raises:
        RowError: one audio_id stands for two files.
    """
    clips: dict[str, tuple[str, bool]] = {}
    for row in rows:
        if row["audio"] is not None:
            name, absent = row["audio_id"], transcribe == "missing" and row.get("input") is None
            path, wanted = clips.get(name, (row["audio"], transcribe == "all"))
            if path != row["audio"]:
                raise RowError(
                    f"audio_id {name!r} is {path} and {row['audio']}. Give data with one --audio_root."
                )
            clips[name] = path, wanted or absent
    return clips


def load(path: str) -> np.ndarray | AudioError:
    """The waveform of a clip, or why there is none."""
    try:
        return load_audio(path)
    except AudioError as error:
        return error


def extract(
    store: FeatureStore,
    extractor: LtuAsFeatureExtractor,
    sounds: dict[str, np.ndarray | AudioError],
    spoken: set[str],
) -> None:
    """Compute a batch and keep what is not there yet. All of it, because a part of it might round otherwise."""
    todo = {name for name in sounds if not store.has(name, name in spoken)}
    heard = {name: sound for name, sound in sounds.items() if not isinstance(sound, AudioError)}
    for name in todo - set(heard):
        store.fail(name, sounds[name].reason, str(sounds[name]))
    if todo.isdisjoint(heard):
        return
    features = extractor(list(heard.values())).input_features
    texts = extractor.transcribe([sound for name, sound in heard.items() if name in spoken])
    texts = dict(zip([name for name in heard if name in spoken], texts, strict=True))
    for name, feature in zip(heard, features, strict=True):
        if name in todo and torch.isfinite(feature).all():
            store.write(name, feature, texts.get(name), len(heard[name]) / SAMPLING_RATE)
        elif name in todo:
            store.fail(
                name,
                "not_finite",
                f"{name}: Whisper's features overflow. Use --feature_precision fp32",
            )


def write_summary(store: FeatureStore, clips: dict[str, tuple[str, bool]]) -> dict:
    """What became of the clips. Written again if another process went on meanwhile, so that the last one is whole."""
    before, ledger = None, {}
    while ledger != before:
        stored = {name for name, (_, wanted) in clips.items() if store.has(name, wanted)}
        marks = {mark["audio_id"]: mark for mark in store.failures()}
        failures = [marks[name] for name in clips if name in marks and name not in stored]
        counts = {"clips": len(clips), "stored": len(stored), "failed": len(failures)}
        counts["not_done"] = len(clips) - len(stored) - len(failures)
        reasons = [mark["reason"] for mark in failures]
        by_reason = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        before, ledger = ledger, counts | {"reasons": by_reason, "failures": failures}
        replace_file(
            store.folder / "summary.json",
            json.dumps(ledger, indent=1, ensure_ascii=False).encode(),
            shared=True,
        )
    return ledger


def extractor_of(args: argparse.Namespace) -> LtuAsFeatureExtractor:
    """That of a checkpoint, or one of any Whisper; flags override its settings."""
    if args.model:
        extractor = AutoProcessor.from_pretrained(
            find_checkpoint(args.model, CHECKPOINT_FILES)
        ).feature_extractor
        if not isinstance(extractor, LtuAsFeatureExtractor):
            raise ValueError(
                f"{args.model} is of LTU, which has no Whisper. Give a checkpoint of LTU-AS, or --whisper."
            )
    else:
        extractor = LtuAsFeatureExtractor(None, None, args.whisper, TEXT_MODELS.get(args.whisper))
    for name in SETTINGS:
        if getattr(args, name) is not None:
            setattr(extractor, name, getattr(args, name))
    is_cuda = args.device is None and torch.cuda.is_available()
    extractor.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if is_cuda else args.device
    return extractor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data_path", required=True, nargs="+", help="rows: JSON list or JSON lines"
    )
    parser.add_argument("--output_dir", required=True, help="folder of the features")
    parser.add_argument(
        "--audio_root", help="folder of relative audio_ids (default: that of the data file)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint folder of LTU-AS; its Whisper is used")
    source.add_argument("--whisper", help="a name such as large-v1, or an openai-whisper .pt file")
    parser.add_argument("--transcription_model", help="another Whisper for the transcripts")
    parser.add_argument(
        "--feature_precision", choices=("fp16", "fp32"), help="of Whisper's encoder"
    )
    parser.add_argument("--language", help="of the speech (default: Whisper finds out)")
    transcribe = {"choices": ("missing", "all", "none"), "default": "missing"}
    parser.add_argument(
        "--transcribe", **transcribe, help="clips that a row leaves without input, all or none"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--max_bad", type=int, default=0, help="clips that may fail without a non-zero exit"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    rows = [
        row
        for path in args.data_path
        for row in read_rows(path, args.audio_root, need_output=False)
    ]
    clips = clips_of(rows, args.transcribe)
    spoken = {name for name, (_, wanted) in clips.items() if wanted}
    extractor = extractor_of(args)
    store = FeatureStore.create(args.output_dir, extractor.describe())
    batches = [
        list(clips)[start : start + args.batch_size]
        for start in range(0, len(clips), args.batch_size)
    ]
    mine = batches[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
    todo = [batch for batch in mine if not all(store.has(name, name in spoken) for name in batch)]
    with (
        ThreadPoolExecutor() as pool
    ):  # The clips of the next batch are read while this one is computed.
        upcoming = (
            {name: pool.submit(load, clips[name][0]) for name in batch} for batch in [*todo, []]
        )
        sounds = next(upcoming)
        for following in tqdm(
            upcoming, total=len(todo), desc="features", unit="batch", disable=not todo
        ):
            extract(
                store, extractor, {name: sound.result() for name, sound in sounds.items()}, spoken
            )
            sounds = following
    ledger = write_summary(store, clips)
    print(
        f"{args.output_dir}: "
        + ", ".join(f"{ledger[key]} {key}" for key in ("stored", "failed", "not_done"))
    )
    for mark in ledger["failures"][:20]:
        print(f"  {mark['reason']}: {mark['detail']}", file=sys.stderr)
    # A process that ends before the others must not exit with 1: torchrun would stop them.
    return int(ledger["failed"] > args.max_bad and ledger["not_done"] == 0)


if __name__ == "__main__":
    run_command(main)
