"""An Arrow index of a file of rows: checked and tokenized once, then mapped into memory by every process that trains.

    python -m ltu.index_dataset all.json --base_model DIR        writes all.json.arrow, which training then opens

Notable:
- The index holds the texts of the rows too, so training reads nothing else. Ranks and workers share its pages.
- Lengths are those before any cutoff, as the tokenizer and the prompt template of a checkpoint make them: one index
  serves every `--cutoff_len`, and all checkpoints of its kind (LTU or LTU-AS) that tokenize alike.
- Transcripts that rows of LTU-AS lack are written into it: by Whisper, or out of `--feature_root`.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor
from tqdm import tqdm

from ltu.data.dataset_parser import RowError
from ltu.data.examples import checked_rows, no_answer_left, with_audio
from ltu.files import sha256_of, sync_and_rename

ENDING = ".arrow"
ROWS_AT_ONCE = 16_384  # of one record batch
TEXTS = ("instruction", "input", "audio_id", "output")
COUNTS = ("num_tokens", "num_prompt_tokens")
MAX_KNOWN = 100_000  # prompts whose number of ids is kept
PROBED = 256  # rows whose lengths are held against the processor that is to train


def build_index(
    path: str | Path,
    processor: Any,
    output: str | Path | None = None,
    audio_root: str | Path | None = None,
) -> Path:
    """Check and tokenize every row, in constant memory; the index appears when it is whole.

    Args:
        path: rows, in any format of `ltu.data.dataset_files`.
        processor: of the checkpoint that is to be trained.
        output: by default FILE.arrow beside the file, where training looks for it.
        audio_root: folder of relative `audio_id`s; only LTU-AS reads clips, for transcripts that are lacking.

    Returns:
        the index.

    Raises:
        RowError: what is wrong with the first ten bad rows, by number; or the file changed meanwhile.
    """
    path, output = Path(path), Path(output or f"{path}{ENDING}")
    rows = checked_rows(path, audio_root)
    first = next(rows)  # Raises what is wrong with the file before it is hashed.
    state = path.stat()
    about = {
        "source": path.name,
        "bytes": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "sha256": sha256_of(path),
    }
    about["transcribes"] = processor.transcribes
    fields = [(name, pyarrow.string()) for name in TEXTS] + [
        (name, pyarrow.int32()) for name in COUNTS
    ]
    schema = pyarrow.schema(fields, {"ltu": json.dumps(about)})
    unfinished = output.with_name(f"{output.name}.tmp")
    try:
        with (
            pyarrow.OSFile(str(unfinished), "wb") as file,
            pyarrow.ipc.new_file(file, schema) as table,
        ):
            with (
                tqdm(desc="indexing", unit="row", unit_scale=True) as bar,
                ThreadPoolExecutor(1) as pool,
            ):
                block, known, waiting = [first, *islice(rows, ROWS_AT_ONCE - 1)], {}, None
                while (
                    block or waiting
                ):  # A block is tokenized, without Python's lock, while the next one is read.
                    made = pool.submit(_columns, block, processor, known) if block else None
                    block = list(islice(rows, ROWS_AT_ONCE)) if block else []
                    if waiting:
                        table.write_batch(pyarrow.record_batch(waiting.result(), schema=schema))
                        bar.update(len(waiting.result()[0]))
                    waiting = made
        if (path.stat().st_size, path.stat().st_mtime_ns) != (state.st_size, state.st_mtime_ns):
            raise RowError(f"{path} changed while it was read. Index it again.")
        sync_and_rename(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    return output


def _columns(rows: list[dict], processor: Any, known: dict[str, int]) -> list[list]:
    rows = processor.add_transcripts(rows)
    return [[_as_utf8(row.get(name), name) for row in rows] for name in TEXTS] + count_tokens(
        rows, processor, known
    )


def _as_utf8(text: str | None, name: str) -> bytes | None:
    """Half of a surrogate pair, which JSON can hold, is replaced as the processor does before it tokenizes."""
    try:
        return (
            None
            if text is None
            else text.encode("utf-8", "strict" if name == "audio_id" else "replace")
        )
    except UnicodeEncodeError as error:
        raise RowError(
            f"The audio_id {text!r} is not UTF-8. Rename the file, or train without an index."
        ) from error


def count_tokens(
    rows: list[dict], processor: Any, known: dict[str, int] | None = None
) -> list[list[int]]:
    """How many ids `encode_example` makes of each row before any cutoff, and how many are the prompt's.

    Args:
        known: prompts counted before, and where these are kept: closed-ended questions are a few hundred in millions.
    """
    known = {} if known is None else known
    rendered_prompts, texts = zip(*map(processor.example, rows), strict=True)
    pairs = zip(processor.encode_all(list(texts)), rendered_prompts, strict=True)
    if len(known) > MAX_KNOWN:
        known.clear()
    prompts = list({rendered.prompt for rendered in rendered_prompts} - known.keys())
    known |= zip(prompts, map(len, processor.encode_all(prompts)), strict=True)
    return [
        [len(ids) + (ids[-1] != rendered.end_id) for ids, rendered in pairs],
        [known[rendered.prompt] for rendered in rendered_prompts],
    ]


class IndexedRows(Sequence):
    """The rows of an index, as `ltu.data.examples.read_rows` returns them, mapped and not read.

    Args:
        path: the index.
        audio_root: folder of relative `audio_id`s; by default that of the index.
        part: (n,) numbers of the rows to have, in their order; by default all.

    Raises:
        RowError: it is no whole index.
    """

    def __init__(
        self, path: str | Path, audio_root: str | Path | None = None, part: Tensor | None = None
    ):
        self.path, self.audio_root = Path(path), Path(audio_root or Path(path).parent)
        try:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            self.about = json.loads(table.schema.metadata[b"ltu"])
            self.batches = [table.get_batch(number) for number in range(table.num_record_batches)]
            counts = [
                np.concatenate([batch.column(name).to_numpy() for batch in self.batches])
                for name in COUNTS
            ]
        except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
            raise RowError(f"{path} is no whole index of rows ({error}). Make it again.") from error
        self.part = torch.arange(len(counts[0])) if part is None else part
        self.num_tokens, self.num_prompt_tokens = (
            torch.from_numpy(count)[self.part] for count in counts
        )  # (n,) int32

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, str | None]:
        batch, place = divmod(int(self.part[index]), ROWS_AT_ONCE)
        row = {name: self.batches[batch].column(name)[place].as_py() for name in TEXTS}
        return with_audio(row, self.audio_root)

    def __reduce__(self) -> tuple:
        return IndexedRows, (
            self.path,
            self.audio_root,
            self.part,
        )  # A spawned worker maps it again.

    def take(self, part: Tensor) -> "IndexedRows":
        """The rows with these numbers."""
        return IndexedRows(self.path, self.audio_root, self.part[part])

    def check(self, processor: Any, cutoff_len: int, train_on_inputs: bool) -> None:
        """Hold the index against what it is used for.

        Raises:
            RowError: it was made with another tokenizer or template or for the other kind of model, or a question
                alone fills the cutoff.
        """
        if (
            self.about["transcribes"] != processor.transcribes
        ):  # What stands where a row has no `input` differs.
            kinds = ("LTU", "LTU-AS")[:: 1 if processor.transcribes else -1]
            raise RowError(
                f"{self.path} was made for {kinds[0]}; this checkpoint is of {kinds[1]}. Make it again."
            )
        probed = torch.linspace(0, len(self) - 1, min(PROBED, len(self))).long()
        counts = count_tokens([self[index] for index in probed], processor)
        if counts != [self.num_tokens[probed].tolist(), self.num_prompt_tokens[probed].tolist()]:
            raise RowError(
                f"{self.path} was made for another tokenizer or prompt template. Make it again."
            )
        lost = self.num_prompt_tokens >= self.num_tokens.clamp(max=cutoff_len)
        if not train_on_inputs and lost.any():
            first = int(lost.nonzero()[0])
            raise no_answer_left(int(self.part[first]), self[first])


def find_index(path: str | Path, audio_root: str | Path | None = None) -> IndexedRows | None:
    """The index that a file is, or has beside it; None if there is none.

    Raises:
        RowError: the file is not the one that was indexed.
    """
    path = Path(path)
    if path.suffix == ENDING:
        return IndexedRows(path, audio_root)
    beside = path.with_name(f"{path.name}{ENDING}")
    if not beside.is_file():
        return None
    rows = IndexedRows(beside, audio_root)
    if path.is_file():
        state, about = path.stat(), rows.about
        is_same = (state.st_size, state.st_mtime_ns) == (about["bytes"], about["mtime_ns"])
        if not is_same and (state.st_size != about["bytes"] or sha256_of(path) != about["sha256"]):
            raise RowError(
                f"{path} is not what {beside} was made of. Index it again, or remove the index."
            )
    return rows
