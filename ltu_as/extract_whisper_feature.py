"""Extracts features and transcripts of the clips of a dataset file into a folder.

    python -m ltu_as.extract_whisper_feature --model CHECKPOINT --data_path D.json --output_dir DIR
    python -m ltu_as.extract_whisper_feature --whisper large-v1 --data_path A B --output_dir DIR
    torchrun --nproc_per_node 4 -m ltu_as.extract_whisper_feature ...

The last command uses four GPUs and writes the same files. A run that was stopped continues when it
is started again. Batches are cut from the list of all clips, whatever is stored already and however
many processes share the work, so the files are the same to the bit.

Size, time and hash of each audio file are stored with its features. A clip whose audio was replaced
under the same name is extracted again, and so is one that an earlier version stored without such a
record. A copy or a moved file with the same content is kept; its new time is stored. Features whose
audio is no longer there are kept.

`summary.json` in the folder lists the clips that failed, with the reason. The exit status is 1 if
more clips failed than `--max_bad`.
"""

import argparse
import json
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import AutoProcessor

import ltu_as  # noqa: F401  registers the classes that the Auto classes look up
from ltu.data.audio import SAMPLING_RATE, AudioError, Waveform, decode_audio
from ltu.data.check_examples import add_ignored_keys, parse_ignored_keys, read_examples
from ltu.data.columns import add_column_flags, read_column_flags
from ltu.data.dataset_io import describe_columns
from ltu.data.dataset_parser import DatasetError
from ltu.data.dataset_source import find_dataset
from ltu.data.table_clip import TableClipError, clip_exists, record_clip
from ltu.files import FileRecord, replace_file, run_command
from ltu.models.device_check import check_device
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint
from ltu_as.feature_extraction_ltu_as import DOWNMIX, TEXT_MODELS, LtuAsFeatureExtractor
from ltu_as.feature_store import ClipState, FeatureStore

SETTINGS = ("transcription_model", "feature_precision", "language")


@dataclass
class Clip:
    """A clip to extract: its path, and whether it is to be transcribed."""

    path: str
    needs_transcript: bool


@dataclass
class LoadedClip:
    """A decoded clip, and what its file was."""

    decoded: Waveform
    source: FileRecord | None


def clips_of(examples: list[dict], transcribe: str) -> dict[str, Clip]:
    """Return the clips of examples by their audio_id, in the order of the examples.

    Args:
        examples: of `ltu.data.check_examples.read_examples`.
        transcribe: "all" clips, "none", or those of examples without `input` ("missing").

    Raises:
        DatasetError: one audio_id is the name of two files.
    """
    clips: dict[str, Clip] = {}
    for example in examples:
        if example["audio"] is None:
            continue
        audio_id = example["audio_id"]
        clip = clips.setdefault(audio_id, Clip(example["audio"], transcribe == "all"))
        if clip.path != example["audio"]:
            raise DatasetError(
                f"audio_id {audio_id!r} is {clip.path} and {example['audio']}. Give data with one "
                "--audio_root."
            )
        if transcribe == "missing" and example.get("input") is None:
            clip.needs_transcript = True
    return clips


def load(path: str) -> LoadedClip | AudioError:
    """Return the waveform of a clip and what its file was, or the error if it cannot be decoded."""
    # The record is made first. If the file changes meanwhile, the record does not fit it, and the
    # next run extracts the clip again.
    source = None
    with suppress(OSError, TableClipError):  # The decoder says why it cannot be read.
        if clip_exists(path):  # A pipe could be read for ever.
            source = record_clip(path)
    try:
        return LoadedClip(decode_audio(path, downmix=DOWNMIX), source)
    except AudioError as error:
        return error


def extract(
    store: FeatureStore,
    extractor: LtuAsFeatureExtractor,
    loaded: dict[str, LoadedClip | AudioError],
    clips: dict[str, Clip],
    states: dict[str, ClipState],
) -> None:
    """Extract a batch, and store what is not stored yet.

    The whole batch is computed, because a part of it might be rounded differently.

    Args:
        store: the folder to write to.
        extractor: computes features and transcripts.
        loaded: the clips of the batch or their errors, by audio_id.
        clips: of `clips_of`.
        states: what was stored of each clip before.
    """
    missing = {name for name in loaded if not states[name].is_complete}
    waveforms = {}
    for name, clip in loaded.items():
        if isinstance(clip, LoadedClip):
            waveforms[name] = clip.decoded.waveform
        elif name in missing:
            mark_failed(store, name, states[name], clip.reason, str(clip))
    if missing.isdisjoint(waveforms):
        return

    features = extractor(list(waveforms.values())).input_features
    spoken = [name for name in waveforms if clips[name].needs_transcript]
    transcripts = extractor.transcribe([waveforms[name] for name in spoken])
    transcripts = dict(zip(spoken, transcripts, strict=True))
    for name, feature in zip(waveforms, features, strict=True):
        if name not in missing:
            continue
        if torch.isfinite(feature).all():
            seconds = len(waveforms[name]) / SAMPLING_RATE
            decoded = loaded[name].decoded
            store.write(
                name,
                feature,
                transcripts.get(name),
                seconds,
                loaded[name].source,
                decoded.is_cut_short,
                decoded.warnings,
            )
        else:
            detail = f"{name}: Whisper's features overflow. Use --feature_precision fp32"
            mark_failed(store, name, states[name], "not_finite", detail)


def mark_failed(store: FeatureStore, name: str, state: ClipState, reason: str, detail: str) -> None:
    """Mark a clip as failed, and remove its features if they are those of other audio."""
    store.fail(name, reason, detail)
    if state is ClipState.CHANGED:
        store.remove(name)


def write_summary(store: FeatureStore, clips: dict[str, Clip]) -> dict:
    """Write `summary.json` and return its content.

    It is written until it no longer changes: another process may store clips meanwhile, and the
    last summary must count all of them.
    """
    summary: dict = {}
    while True:
        previous = summary
        summary = summarize(store, clips)
        replace_file(
            store.folder / "summary.json",
            json.dumps(summary, indent=1, ensure_ascii=False).encode(),
            shared=True,
        )
        if summary == previous:
            return summary


def summarize(store: FeatureStore, clips: dict[str, Clip]) -> dict:
    """Count the clips that are stored, failed or not done, and list the failures."""
    stored = set()
    for name, clip in clips.items():
        if store.state_of(name, clip.path, clip.needs_transcript).is_complete:
            stored.add(name)
    markers = {marker["audio_id"]: marker for marker in store.failures()}
    failures = [markers[name] for name in clips if name in markers and name not in stored]
    reasons = [failure["reason"] for failure in failures]
    return {
        "clips": len(clips),
        "stored": len(stored),
        "failed": len(failures),
        "not_done": len(clips) - len(stored) - len(failures),
        "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "failures": failures,
    }


def find_states(
    store: FeatureStore, names: list[str], clips: dict[str, Clip]
) -> dict[str, ClipState]:
    """Return what is stored of these clips, and store the time of those that were moved."""
    states = {}
    for name in names:
        clip = clips[name]
        states[name] = store.state_of(name, clip.path, clip.needs_transcript)
        if states[name] is ClipState.MOVED:
            store.renew_record(name, clip.path)
            states[name] = ClipState.KEPT
    return states


def describe_states(states: dict[str, ClipState]) -> str:
    """Return how many clips are new, changed and kept, and how many of them lack something."""
    found = list(states.values())
    parts = []
    for state in ClipState:
        is_always_named = state in (ClipState.NEW, ClipState.CHANGED, ClipState.KEPT)
        if state in found or is_always_named:
            parts.append(f"{found.count(state)} {state.value}")
    return ", ".join(parts)


def extractor_of(args: argparse.Namespace) -> LtuAsFeatureExtractor:
    """Return the feature extractor of a checkpoint, or of any Whisper; flags change its settings.

    Raises:
        ValueError: the checkpoint is of LTU.
    """
    if args.model:
        folder = find_checkpoint(args.model, CHECKPOINT_FILES)
        extractor = AutoProcessor.from_pretrained(folder).feature_extractor
        if not isinstance(extractor, LtuAsFeatureExtractor):
            raise ValueError(
                f"{args.model} is of LTU, which has no Whisper. Give a checkpoint of LTU-AS, or "
                "--whisper."
            )
    else:
        extractor = LtuAsFeatureExtractor(None, None, args.whisper, TEXT_MODELS.get(args.whisper))
    for name in SETTINGS:
        if getattr(args, name) is not None:
            setattr(extractor, name, getattr(args, name))
    if args.loop_short_clips:
        extractor.loop_short_clips = True
    if args.num_audio_tokens is not None:
        extractor.num_tokens = args.num_audio_tokens
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
        "--data_path",
        required=True,
        nargs="+",
        help="Data sets: JSON list, JSON lines (also .gz, .zst), Parquet, folders of datasets' "
        "save_to_disk, or data sets of the hub (owner/name).",
    )
    parser.add_argument("--output_dir", required=True, help="Folder to write the features to.")
    parser.add_argument(
        "--audio_root",
        help="Folder to which audio_ids are relative. The default is that of the dataset file.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="Checkpoint folder of LTU-AS, whose Whisper is used.")
    source.add_argument("--whisper", help="A name such as large-v1, or an openai-whisper .pt file.")
    parser.add_argument("--transcription_model", help="Another Whisper for the transcripts.")
    parser.add_argument(
        "--feature_precision", choices=("fp16", "fp32"), help="Precision of Whisper's encoder."
    )
    parser.add_argument(
        "--language", help="Language of the speech, such as en. By default, Whisper detects it."
    )
    parser.add_argument(
        "--loop_short_clips",
        action="store_true",
        help="With --whisper: repeat clips that are shorter than a chunk (10 s) instead of padding "
        "them with silence, for a new TLTR.",
    )
    parser.add_argument(
        "--num_audio_tokens",
        type=int,
        help="With --whisper: time steps of a chunk, for a new TLTR (25).",
    )
    parser.add_argument(
        "--transcribe",
        choices=("missing", "all", "none"),
        default="missing",
        help="Clips to transcribe: those of examples without input (missing), all or none.",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="Number of clips in a batch.")
    parser.add_argument(
        "--max_bad",
        type=int,
        default=0,
        help="Number of clips that may fail before the exit status is 1.",
    )
    parser.add_argument(
        "--device",
        help="Device of Whisper: cuda, cuda:1 or cpu. The default is a GPU if there is one.",
    )
    add_ignored_keys(parser)
    add_column_flags(parser)
    args = parser.parse_args(argv)
    if args.device is not None:
        check_device(args.device)
    if args.model and (args.loop_short_clips or args.num_audio_tokens is not None):
        parser.error(
            "--loop_short_clips and --num_audio_tokens are for a new TLTR: with --model, the "
            "settings of the checkpoint count"
        )

    ignored_keys = parse_ignored_keys(args.ignored_keys)
    columns = read_column_flags(args)
    examples = []
    for path in args.data_path:
        source = find_dataset(path, columns.split)
        for line in describe_columns(source, columns):
            print(f"{path}: {line}")
        examples += read_examples(source, args.audio_root, False, ignored_keys, columns)
    clips = clips_of(examples, args.transcribe)
    extractor = extractor_of(args)
    store = FeatureStore.create(args.output_dir, extractor.describe())

    # Divide the batches among the processes, and leave out those that are stored whole.
    names = list(clips)
    batches = [
        names[start : start + args.batch_size] for start in range(0, len(names), args.batch_size)
    ]
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    own_batches = batches[rank::world_size]
    states = find_states(store, [name for batch in own_batches for name in batch], clips)
    todo = []
    for batch in own_batches:
        if not all(states[name].is_complete for name in batch):
            todo.append(batch)

    # Threads load the clips of the next batch while the current one is computed.
    with ThreadPoolExecutor() as pool:

        def start_loading(batch: list[str]) -> dict[str, Future]:
            return {name: pool.submit(load, clips[name].path) for name in batch}

        next_batch = start_loading(todo[0]) if todo else {}
        for number in tqdm(range(len(todo)), desc="features", unit="batch", disable=not todo):
            batch = next_batch
            if number + 1 < len(todo):
                next_batch = start_loading(todo[number + 1])
            # The waveforms are not given a name here, so that only two batches are in memory.
            extract(
                store,
                extractor,
                {name: future.result() for name, future in batch.items()},
                clips,
                states,
            )

    summary = write_summary(store, clips)
    counts = [f"{summary[key]} {key}" for key in ("stored", "failed", "not_done")]
    found = f"{len(states)} clips were found {describe_states(states)}"
    print(f"{args.output_dir}: {', '.join(counts)}; {found}")
    for failure in summary["failures"][:20]:
        print(f"  {failure['reason']}: {failure['detail']}", file=sys.stderr)
    if world_size == 1 and summary["not_done"]:
        print(
            f"error: {summary['not_done']} clips changed while they were extracted. Run the "
            "command again when nothing writes them.",
            file=sys.stderr,
        )
        return 1
    # A process that ends before the others must not exit with 1: torchrun would stop them.
    return int(summary["failed"] > args.max_bad and summary["not_done"] == 0)


if __name__ == "__main__":
    run_command(main)
