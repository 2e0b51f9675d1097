"""Examples as tokens, labels and features.

A clip that cannot be decoded is skipped, counted and named; the next example takes its place, so steps
and batch sizes stay. Features are never made up. More than `max_bad` such examples stop the run.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ltu.data.audio import AudioError
from ltu.data.dataset_parser import RowError
from ltu.data.examples import no_answer_left

logger = logging.getLogger(__name__)

MAX_UNINDEXED = 100_000  # rows that are tokenized at the start of a run, in about half a minute


class QaDataset(Dataset):
    """Rows as ids, labels and features.

    Args:
        rows: of `read_rows`.
        encode: row -> (ids, labels); `LtuProcessor.encode_example` with its settings.
        load_features: row -> what the ear takes; `LtuProcessor.load_features`.
        max_bad: how many different rows this process may skip because their clip cannot be heard.
        lengths: (rows,) text ids of each, by which batches are grouped, where an index knows them. Otherwise the rows
            are tokenized here, unless there are too many: then `lengths` is None.
        numbers: of each row in its file, from 0; by default its place in `rows`.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        encode: Callable,
        load_features: Callable,
        max_bad: int = 0,
        lengths: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
    ):
        self.rows = rows
        self.encode = encode
        self.load_features = load_features
        self.max_bad = max_bad
        self.numbers = range(len(rows)) if numbers is None else numbers
        self.lengths = lengths
        if lengths is None and len(rows) <= MAX_UNINDEXED:
            self.lengths = self._count_tokens()
        # Shared memory, because each worker of the data loader is a process of its own.
        self.is_bad = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def _count_tokens(self) -> torch.Tensor:
        lengths = torch.zeros(len(self.rows), dtype=torch.int32)
        for index, row in enumerate(
            tqdm(self.rows, desc="tokenizing", unit="row", disable=len(self.rows) < 20_000)
        ):
            ids, labels = self.encode(row)
            if max(labels) < 0:
                raise no_answer_left(int(self.numbers[index]), row)
            lengths[index] = len(ids)
        return lengths

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def skipped(self) -> list[str]:
        """`audio_id` of every row skipped so far."""
        return [self.rows[index]["audio_id"] for index in self.is_bad.nonzero()[:, 0].tolist()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        for offset in range(len(self)):
            row = (index + offset) % len(self)
            content = self.rows[row]
            try:
                features = None if content["audio"] is None else self.load_features(content)
            except AudioError as error:
                self._skip(row, error)
                continue
            ids, labels = self.encode(content)
            if max(labels) < 0:
                raise no_answer_left(int(self.numbers[row]), content)
            return {"input_ids": ids, "labels": labels, "input_features": features}
        raise RowError(f"None of the {len(self)} rows has a clip that can be heard.")

    def _skip(self, row: int, error: AudioError) -> None:
        if not self.is_bad[row]:
            self.is_bad[row] = True
            logger.warning("Row %d skipped: %s", self.numbers[row] + 1, error)
        if int(self.is_bad.sum()) > self.max_bad:
            raise RowError(
                f"{int(self.is_bad.sum())} rows have a clip that cannot be heard, more than --max_bad {self.max_bad}. "
                f"The last: row {self.numbers[row] + 1}: {error} Mend the rows (--check_audio lists them all at "
                "start), or allow more with --max_bad."
            ) from error
