"""Builds and reads the Arrow index of a dataset file.

    python -m ltu.index_dataset all.json --base_model DIR        writes all.json.arrow

The examples are checked and tokenized once, when the index is built. Every process that trains then
maps the index into memory, so that ranks and workers share its pages. The index contains the texts
of the examples too: training reads nothing else.

Lengths are those before any cutoff, for the tokenizer and the prompt template of a checkpoint. One
index therefore serves every `--cutoff_len`, and all checkpoints of the same kind (LTU or LTU-AS)
that tokenize alike. Transcripts that examples of LTU-AS lack are written into the index: Whisper
makes them, or they are read from `--feature_root`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ltu.data.audio import AudioError
from ltu.data.check_examples import (
    MAX_LISTED_CLIPS,
    NO_AUDIO,
    check_num_errors,
    checked_examples,
    list_errors,
    with_audio,
)
from ltu.data.columns import ColumnFlags
from ltu.data.dataset_io import describe_columns, find_columns, hash_source
from ltu.data.dataset_parser import DatasetError
from ltu.data.dataset_source import INDEX_ENDING, DatasetSource, find_dataset, index_path_of
from ltu.files import check_regular_file, lock_file, sync_and_rename
from ltu.models.processing_ltu import LtuProcessor

# Only where there is an index. As in `ltu.data.dataset_io`, JSON needs no pyarrow.
if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

VERSION = 2  # Of the rules by which examples are checked before they are indexed.
EXAMPLES_AT_ONCE = 16_384  # Examples in one record batch.
TEXTS = ("instruction", "input", "audio_id", "output")
COUNTS = ("num_tokens", "num_prompt_tokens")
CLIP_HASH = "clip_hash"  # Column by which distinct clips are counted without reading their names.
MAX_KNOWN = 100_000  # Prompts whose number of tokens is cached.
PROBED = 256  # Examples whose lengths are compared with those of the processor that is to train.


def build_index(
    path: str | Path,
    processor: LtuProcessor,
    output: str | Path | None = None,
    audio_root: str | Path | None = None,
    max_bad: int = 0,
    ignored_keys: Collection[str] = (),
    columns: ColumnFlags | None = None,
) -> Path:
    """Check and tokenize every example, in constant memory.

    The index gets its name when it is complete.

    Args:
        path: the dataset file, in any format of `ltu.data.dataset_io`.
        processor: the processor of the checkpoint that is to be trained.
        output: the index. The default is FILE.arrow next to the dataset file (FOLDER/SPLIT.arrow
            for a split of a folder), where training looks for it.
        audio_root: folder to which `audio_id`s are relative. Only LTU-AS reads clips, to make
            missing transcripts.
        max_bad: how many clips may fail to be transcribed; their examples get the transcript "".
        ignored_keys: further keys that examples may have; the index does not contain them.
        columns: the split, and the names of the columns.

    Returns:
        The path of the index.

    Raises:
        DatasetError: examples are not valid or more than `max_bad` clips cannot be decoded (the
            message lists the first of them), or the file changed while it was read.
    """
    import pyarrow

    columns = columns or ColumnFlags()
    source = find_dataset(path, columns.split)
    if output is None and not source.is_local:
        raise DatasetError(
            f"{source.name} has no folder of its own for an index. Give --output_path FILE.arrow, "
            "and train with --data_path FILE.arrow."
        )
    output = Path(output or index_path_of(path, columns.split))
    examples = checked_examples(path, audio_root, ignored_keys=ignored_keys, columns=columns)
    # Read the first example now: a file that is not valid fails before it is hashed.
    first = next(examples)
    state = (source.size, source.mtime_ns)
    schema = _index_schema(source, columns, output, processor)
    unfinished = output.with_name(f"{output.name}.tmp")
    errors: dict[str, AudioError] = {}
    is_renamed = False
    lock = lock_file(unfinished, output)
    try:
        with (
            pyarrow.OSFile(str(unfinished), "wb") as file,
            pyarrow.ipc.new_file(file, schema) as table,
            tqdm(desc="indexing", unit="example", unit_scale=True) as bar,
        ):
            for values in _tokenize_blocks(first, examples, processor, errors):
                table.write_batch(pyarrow.record_batch(values, schema=schema))
                bar.update(len(values[0]))
                if len(errors) >= max_bad + MAX_LISTED_CLIPS:
                    break  # Enough to list; transcribing the rest may take days.
        check_num_errors(errors, source.name, max_bad)
        if errors:
            logger.warning(
                '%d clips have the transcript "" now:\n%s', len(errors), list_errors(errors)
            )
        if (source.size, source.mtime_ns) != state:
            raise DatasetError(f"{source.name} changed while it was read. Index it again.")
        sync_and_rename(unfinished, output)
        is_renamed = True
    finally:
        if not is_renamed:  # Otherwise the name may be that of another run by now.
            unfinished.unlink(missing_ok=True)
        lock.close()
    return output


def _index_schema(
    source: DatasetSource, columns: ColumnFlags, output: Path, processor: LtuProcessor
) -> "pyarrow.Schema":
    """Return the columns of an index, with a description of the dataset file as metadata."""
    import pyarrow

    about = {
        "version": VERSION,
        "source": source.short_name,
        "bytes": source.size,
        "mtime_ns": source.mtime_ns,
        "sha256": hash_source(source, columns),
        "transcribes": processor.front_end.transcribes,
        "columns": columns.to_json(),
        "described": describe_columns(source, columns),
        "root": _root_of_clips(source, columns, output),
    }
    fields = [(name, pyarrow.string()) for name in TEXTS]
    fields += [(name, pyarrow.int32()) for name in COUNTS]
    fields.append((CLIP_HASH, pyarrow.int64()))
    return pyarrow.schema(fields, {"ltu": json.dumps(about)})


def _root_of_clips(source: DatasetSource, columns: ColumnFlags, output: Path) -> str | None:
    """Return where the tables with the clips are: relative to the index if it can move with them.

    Returns:
        None if the clips are files: their folder is that of the index, or `--audio_root`.
    """
    found = find_columns(source, columns)
    if found is None or not found.has_clips:
        return None
    if not source.is_local:
        return str(source.root.absolute())
    return os.path.relpath(source.root.absolute(), output.parent.absolute())


def _tokenize_blocks(
    first: dict,
    examples: Iterator[dict],
    processor: LtuProcessor,
    errors: dict[str, AudioError],
) -> Iterator[list[list]]:
    """Yield the columns of each block of `EXAMPLES_AT_ONCE` examples.

    A thread tokenizes a block while the next one is read; the tokenizer releases Python's lock.
    """
    known: dict[str, int] = {}
    block = [first, *islice(examples, EXAMPLES_AT_ONCE - 1)]
    pending: Future | None = None
    with ThreadPoolExecutor(1) as pool:
        while block:
            submitted = pool.submit(_make_columns, block, processor, known, errors)
            block = list(islice(examples, EXAMPLES_AT_ONCE))
            if pending is not None:
                yield pending.result()
            pending = submitted
        if pending is not None:
            yield pending.result()


def _make_columns(
    examples: list[dict],
    processor: LtuProcessor,
    known: dict[str, int],
    errors: dict[str, AudioError],
) -> list[list]:
    """Return the columns `TEXTS`, `COUNTS` and `CLIP_HASH` of a block of examples."""
    examples = processor.front_end.add_transcripts(examples, errors)
    columns = []
    for name in TEXTS:
        columns.append([_as_utf8(example.get(name), name) for example in examples])
    hashes = [_clip_hash(example["audio_id"]) for example in examples]
    return [*columns, *count_tokens(examples, processor, known), hashes]


def _clip_hash(audio_id: str | None) -> int:
    """Return 62 bits of a hash of an `audio_id` plus 1, or 0 for a question without audio."""
    if audio_id in NO_AUDIO:
        return 0
    digest = hashlib.blake2b(audio_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") // 4 + 1


def _as_utf8(text: str | None, name: str) -> bytes | None:
    """Encode a text as UTF-8.

    Half of a surrogate pair, which JSON can contain, is replaced, as the processor does before it
    tokenizes. In an `audio_id` it would change the name of a file.

    Raises:
        DatasetError: an `audio_id` is not UTF-8.
    """
    if text is None:
        return None
    try:
        return text.encode("utf-8", "strict" if name == "audio_id" else "replace")
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"The audio_id {text!r} is not UTF-8. Rename the file, or train without an index."
        ) from error


def count_tokens(
    examples: list[dict], processor: LtuProcessor, known: dict[str, int] | None = None
) -> list[list[int]]:
    """Count the text tokens that `encode_example` makes of each example, before any cutoff.

    Args:
        known: cache of the number of tokens of prompts, which this call extends. A few hundred
            closed-ended questions make up millions of examples.

    Returns:
        Two lists, with a number for each example: its tokens, and those of its prompt.
    """
    known = {} if known is None else known
    rendered_prompts = []
    texts = []
    for example in examples:
        rendered, text = processor.example(example)
        rendered_prompts.append(rendered)
        texts.append(text)

    # The end token is added to a text that does not end with it.
    num_tokens = []
    for tokens, rendered in zip(processor.encode_all(texts), rendered_prompts, strict=True):
        has_end = tokens[-1] == rendered.end_id
        num_tokens.append(len(tokens) if has_end else len(tokens) + 1)

    if len(known) > MAX_KNOWN:
        known.clear()
    new_prompts = list({rendered.prompt for rendered in rendered_prompts} - known.keys())
    for prompt, tokens in zip(new_prompts, processor.encode_all(new_prompts), strict=True):
        known[prompt] = len(tokens)
    num_prompt_tokens = [known[rendered.prompt] for rendered in rendered_prompts]
    return [num_tokens, num_prompt_tokens]


class IndexedExamples(Sequence):
    """The examples of an index, mapped into memory.

    They are as `ltu.data.check_examples.read_examples` returns them.

    Args:
        path: the index.
        audio_root: folder to which `audio_id`s are relative. The default is the folder of the
            index.
        part: (n,) numbers of the examples to use, in their order. The default is all examples.

    Raises:
        DatasetError: the file is not a complete index.
    """

    def __init__(
        self, path: str | Path, audio_root: str | Path | None = None, part: Tensor | None = None
    ):
        import pyarrow

        self.path = Path(path)
        try:
            check_regular_file(path)
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            self.about = json.loads(table.schema.metadata[b"ltu"])
            self.batches = [table.get_batch(number) for number in range(table.num_record_batches)]
            num_tokens = self._read_counts("num_tokens")
            num_prompt_tokens = self._read_counts("num_prompt_tokens")
        except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{path} is not a complete index ({error}). Build it again."
            ) from error
        if not isinstance(self.about, dict) or self.about.get("version") != VERSION:
            raise DatasetError(
                f"{path} was made by another version of this program, whose rules for examples "
                "were others. Build it again."
            )
        root = self.about.get("root")
        if root is not None and audio_root is not None:
            raise DatasetError(
                f"--audio_root has no effect: the clips of {path} are in tables. Leave the flag "
                "out."
            )
        self.audio_root = audio_root  # As it was given, for `__reduce__`.
        self.root = Path(audio_root or self.path.parent / (root or ""))
        self.part = torch.arange(len(num_tokens)) if part is None else part
        self.num_tokens = num_tokens[self.part]  # (n,) int32
        self.num_prompt_tokens = num_prompt_tokens[self.part]  # (n,) int32

    def _read_counts(self, name: str) -> Tensor:
        """Return a column of numbers of all examples, (examples in the index,) int32."""
        counts = [batch.column(name).to_numpy() for batch in self.batches]
        return torch.from_numpy(np.concatenate(counts))

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, str | None]:
        # All record batches but the last one have the same number of examples.
        number, position = divmod(int(self.part[index]), len(self.batches[0]))
        batch = self.batches[number]
        example = {name: batch.column(name)[position].as_py() for name in TEXTS}
        return with_audio(example, self.root)

    def __reduce__(self) -> tuple:
        # A spawned worker maps the index again.
        return IndexedExamples, (self.path, self.audio_root, self.part)

    def take(self, part: Tensor) -> "IndexedExamples":
        """Return the examples at the positions `part`, (n,)."""
        return IndexedExamples(self.path, self.audio_root, self.part[part])

    def count_audio(self) -> tuple[int, int]:
        """Count the examples with audio, and their distinct clips, of the whole index."""
        hashes = [batch.column(CLIP_HASH).to_numpy() for batch in self.batches]
        hashes = np.concatenate(hashes)  # (examples in the index,) int64
        hashes = hashes[hashes != 0]
        return len(hashes), len(np.unique(hashes))

    def check(self, processor: LtuProcessor) -> None:
        """Validate the index against the processor of the run that uses it.

        Raises:
            DatasetError: the index was made with another tokenizer or prompt template or for the
                other kind of model.
        """
        # A model with transcripts fills in other texts where an example has no `input`.
        transcribes = processor.front_end.transcribes
        if self.about["transcribes"] != transcribes:
            kinds = {True: "a model with transcripts", False: "a model without transcripts"}
            raise DatasetError(
                f"{self.path} was made for {kinds[not transcribes]}; this checkpoint is of "
                f"{kinds[transcribes]}. Build it again."
            )

        probed = torch.linspace(0, len(self) - 1, min(PROBED, len(self))).long()
        expected = count_tokens([self[index] for index in probed], processor)
        stored = [self.num_tokens[probed].tolist(), self.num_prompt_tokens[probed].tolist()]
        if stored != expected:
            raise DatasetError(
                f"{self.path} was made for another tokenizer or prompt template. Build it again."
            )


def find_index(
    path: str | Path,
    audio_root: str | Path | None = None,
    columns: ColumnFlags | None = None,
) -> IndexedExamples | None:
    """Open the index at `path`, or the one next to the dataset file `path`.

    Args:
        path: of the index or of the data set.
        audio_root: as for `IndexedExamples`.
        columns: the split, and the names of the columns. With the path of an index, they need not
            be repeated.

    Returns:
        The examples of the index, or None if there is no index.

    Raises:
        DatasetError: the dataset file is not the one that was indexed, or other columns were.
    """
    path = Path(path)
    columns = columns or ColumnFlags()
    is_index = path.suffix == INDEX_ENDING
    index_path = path if is_index else index_path_of(path, columns.split)
    if not is_index and not index_path.is_file():
        return None
    indexed = IndexedExamples(index_path, audio_root)
    stored = indexed.about.get("columns", {})
    if stored != columns.to_json() and (columns.renames or not is_index):
        raise DatasetError(
            f"{index_path} was made with {_show_flags(stored)}, now there are "
            f"{_show_flags(columns.to_json())}. Index the data set again, or remove the index."
        )
    if not is_index and path.exists() and not _is_source_of(indexed, path, columns):
        kind = "folder" if path.is_dir() else "file"
        raise DatasetError(
            f"{path} is not the {kind} that {index_path} was made of. Index it again, or remove "
            "the index."
        )
    return indexed


def _show_flags(flags: dict[str, str]) -> str:
    shown = [f"--{name} {value!r}" for name, value in flags.items()]
    return ", ".join(shown) or "no flags for columns"


def _is_source_of(indexed: IndexedExamples, path: Path, columns: ColumnFlags) -> bool:
    """Return whether a data set is still the one that was indexed.

    It is only read if its time differs, as that of a copy does.
    """
    source = find_dataset(path, columns.split)
    about = indexed.about
    if source.size != about["bytes"]:
        return False
    return source.mtime_ns == about["mtime_ns"] or hash_source(source, columns) == about["sha256"]
