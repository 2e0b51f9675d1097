"""Turns examples into tokens, labels and audio features.

An example whose clip cannot be decoded is skipped, counted and named; the next example takes its
place, so that the number of steps and the size of batches stay. Features are never made up. More
than `max_bad` such examples stop the run.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ltu.data.audio import AudioError
from ltu.data.check_examples import no_answer_left
from ltu.data.dataset_parser import DatasetError

logger = logging.getLogger(__name__)

MAX_UNINDEXED = 100_000  # Examples that are tokenized at the start of a run, in half a minute.
MIN_PROGRESS_BAR = 20_000  # Examples; fewer are tokenized without a progress bar.


class QaDataset(Dataset):
    """Examples as tokens, labels and features.

    Args:
        examples: the examples, as `ltu.data.check_examples.read_examples` returns them.
        encode: example -> (tokens, labels), such as `LtuProcessor.encode_example`.
        load_features: example -> input of the audio encoder, such as `AudioFrontEnd.load_features`.
        max_bad: how many different examples this process may skip because their clip cannot be
            decoded.
        lengths: (examples,) number of text tokens of each example, which an index stores. Without
            them the examples are tokenized here, unless there are more than `MAX_UNINDEXED`: then
            the attribute `lengths` is None.
        numbers: (examples,) number of each example in its dataset file, from 0. By default it is
            its position in `examples`.
    """

    def __init__(
        self,
        examples: Sequence[dict],
        encode: Callable,
        load_features: Callable,
        max_bad: int = 0,
        lengths: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
    ):
        self.examples = examples
        self.encode = encode
        self.load_features = load_features
        self.max_bad = max_bad
        self.numbers = range(len(examples)) if numbers is None else numbers
        self.lengths = lengths
        if lengths is None and len(examples) <= MAX_UNINDEXED:
            self.lengths = self._count_tokens()
        # Shared memory, because each worker of the data loader is a process of its own.
        self.is_bad = torch.zeros(len(examples), dtype=torch.bool).share_memory_()

    def _count_tokens(self) -> torch.Tensor:
        """Return the number of text tokens of each example, (examples,) int32."""
        lengths = torch.zeros(len(self.examples), dtype=torch.int32)
        is_quick = len(self.examples) < MIN_PROGRESS_BAR
        bar = tqdm(self.examples, desc="tokenizing", unit="example", disable=is_quick)
        for index, example in enumerate(bar):
            tokens, _ = self._encode(index, example)
            lengths[index] = len(tokens)
        return lengths

    def _encode(self, index: int, example: dict) -> tuple[list[int], list[int]]:
        """Return the tokens and labels of an example.

        Raises:
            DatasetError: no token of the example carries loss.
        """
        tokens, labels = self.encode(example)
        if max(labels) < 0:
            raise no_answer_left(int(self.numbers[index]), example)
        return tokens, labels

    def __len__(self) -> int:
        return len(self.examples)

    def name_of(self, index: int) -> str:
        """Return the number (from 1, in the dataset file) and the clip of an example."""
        return f"{int(self.numbers[index]) + 1} ({self.examples[index]['audio_id']})"

    @property
    def skipped(self) -> list[str]:
        """The `audio_id` of every example that was skipped so far."""
        indices = self.is_bad.nonzero()[:, 0].tolist()
        return [self.examples[index]["audio_id"] for index in indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example, or the next one whose clip can be decoded.

        Returns:
            `input_ids` and `labels`, lists of the same length, and `input_features`, the input of
            the audio encoder, which is None for an example without audio.

        Raises:
            DatasetError: more than `max_bad` clips or all clips cannot be decoded, or no token
                carries loss.
        """
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            example = self.examples[candidate]
            features = None
            if example["audio"] is not None:
                try:
                    features = self.load_features(example)
                except AudioError as error:
                    self._skip(candidate, error)
                    continue
            tokens, labels = self._encode(candidate, example)
            return {"input_ids": tokens, "labels": labels, "input_features": features}
        raise DatasetError(f"None of the {len(self)} examples has a clip that can be decoded.")

    def _skip(self, index: int, error: AudioError) -> None:
        """Mark an example as skipped.

        Raises:
            DatasetError: more than `max_bad` examples were skipped.
        """
        number = int(self.numbers[index]) + 1
        if not self.is_bad[index]:
            self.is_bad[index] = True
            logger.warning("Example %d skipped: %s", number, error)
        num_bad = int(self.is_bad.sum())
        if num_bad > self.max_bad:
            raise DatasetError(
                f"{num_bad} examples have a clip that cannot be decoded, more than --max_bad "
                f"{self.max_bad}. The last: example {number}: {error} Fix the dataset file "
                "(--check_audio looks for such clips at the start), or allow more with --max_bad."
            ) from error
