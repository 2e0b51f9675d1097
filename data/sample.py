r"""Samples a few clips with all their questions: a small dataset from a large one.

    python -m data.sample --data_path A.json --output_path toy/examples.json --clips 500 --seed 1
    python -m data.sample --data_path A.json --output_path toy/examples.json --clips 50 \
        --by_dataset --copy_audio
    python -m data.sample --data_path OWNER/NAME::train --output_path toy.parquet --clips 500 \
        --embed_audio --question "What is said?" --answer_column text

The seed and the audio_id decide whether a clip is sampled, and the order of the examples does not:
two files with the same clips give the same clips. Every clip has the same probability, however many
questions it has.

--embed_audio stores the clips in the output, a Parquet file. --copy_audio copies them into audio/
next to the output, and the audio_ids of the output are then relative to it. Both take a clip only
if it is, after all links are followed, below --audio_root or an --allowed_root, and decodes as
audio. Otherwise nothing is written: the dataset file may name any file of this machine, and the
copy may be published.
"""

import hashlib
from collections import defaultdict
from contextlib import nullcontext

from data.command_line import add_audio_root, command_parser, source_of
from data.copy_clips import check_clips, copied_clips
from data.embedded_clips import add_embed_flags, make_embedder, reader_of, resolve_ids
from data.provenance import clip_facts, write_examples, write_provenance
from ltu.data.check_examples import NO_AUDIO
from ltu.data.columns import ColumnFlags, read_column_flags
from ltu.data.dataset_io import typed_examples
from ltu.data.dataset_source import DatasetSource
from ltu.files import run_command

DIGEST_SIZE = 16  # Bytes of the hash that a clip is sampled by.


def choose_clips(
    source: DatasetSource, clips: int, seed: int, by_dataset: bool, columns: ColumnFlags
) -> set[str]:
    """Return the `audio_id`s with the lowest hashes.

    Args:
        source: the dataset.
        clips: number of clips, of each dataset if `by_dataset`.
        seed: hashed together with the `audio_id`.
        by_dataset: whether to choose so many of each dataset.
        columns: of the dataset.
    """
    chosen: dict[str, dict[str, bytes]] = defaultdict(dict)  # Dataset -> audio_id -> hash.
    highest: dict[str, bytes] = {}  # Dataset -> hash; clips with higher ones are not chosen.
    for example in typed_examples(source, columns):
        audio_id = example.get("audio_id")
        if audio_id in NO_AUDIO:
            continue
        group = str(example.get("dataset")) if by_dataset else ""
        content = f"{seed}/{audio_id}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()
        if digest > highest.get(group, b"\xff" * DIGEST_SIZE):
            continue
        chosen[group][audio_id] = digest
        # Drop the higher half from time to time, so that the memory stays constant.
        if len(chosen[group]) >= 2 * clips:
            lowest = sorted(chosen[group].items(), key=lambda pair: pair[1])[:clips]
            chosen[group] = dict(lowest)
            highest[group] = lowest[-1][1]
    # Choose the lowest hashes of those that are left.
    names: set[str] = set()
    for digests in chosen.values():
        names.update(sorted(digests, key=digests.__getitem__)[:clips])
    return names


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--clips", type=int, required=True, help="The number of clips to sample.")
    parser.add_argument(
        "--by_dataset", action="store_true", help="Sample so many clips of each dataset."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed that selects the clips (default: 0)."
    )
    add_audio_root(parser)
    parser.add_argument(
        "--copy_audio", action="store_true", help="Copy the clips into audio/ next to the output."
    )
    add_embed_flags(parser)
    args = parser.parse_args(argv)
    if args.clips < 1:
        parser.error(f"--clips must be at least 1, got {args.clips}")
    if args.embed_audio and args.copy_audio:
        parser.error("--embed_audio and --copy_audio exclude each other")
    if args.allowed_root and not (args.copy_audio or args.embed_audio):
        parser.error("--allowed_root has no effect without --copy_audio or --embed_audio")
    columns = read_column_flags(args)
    source = source_of(args)
    embedder = make_embedder(args, [source])
    chosen = choose_clips(source, args.clips, args.seed, args.by_dataset, columns)
    if not chosen:
        raise ValueError(f"{args.data_path} has no example with a clip, so nothing can be sampled.")
    copies = nullcontext({})
    if args.copy_audio:
        roots = [args.audio_root or source.root, *args.allowed_root]
        clips = check_clips(chosen, source, roots, columns)
        copies = copied_clips(clips, args.output_path.parent)
    writer = write_examples(args.output_path, [source], reader_of(embedder))
    with copies as new_ids, writer as output:
        found = typed_examples(source, columns)
        sampled = (example for example in found if example.get("audio_id") in chosen)
        for example in resolve_ids(embedder, sampled, source):
            audio_id = example["audio_id"]
            output.write(example | {"audio_id": new_ids.get(audio_id, audio_id)})
    facts = {
        "num_examples": output.count,
        "clips": len(chosen),
        "seed": args.seed,
        "by_dataset": args.by_dataset,
        "copied": args.copy_audio,
    }
    if not args.copy_audio:
        facts |= clip_facts(args, args.output_path, [source], columns)
    write_provenance(args.output_path, "sample", [source], **facts)
    print(f"{args.output_path}: {output.count:,} examples on {len(chosen):,} clips")
    return 0


if __name__ == "__main__":
    run_command(main)
