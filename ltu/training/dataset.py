"""Turns examples into tokens, labels and audio features.

An example whose clip cannot be decoded, or whose question leaves no token of the answer within the
cutoff, is skipped, counted and named; the next example takes its place, so that the number of steps
and the size of batches stay. Features are never made up. More than `max_bad` such examples stop the
run.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from ltu.data.audio import AudioError
from ltu.data.dataset_parser import DatasetError
from ltu.models.processing_ltu import LtuProcessor

logger = logging.getLogger(__name__)


class NoAnswerError(ValueError):
    """An example whose question alone fills the cutoff, so that no token of the answer is left."""

    def __init__(self, cutoff_len: int, question: str):
        super().__init__(
            f"no answer is left within --cutoff_len {cutoff_len}, because the question alone fills "
            f"it: {question[:80]!r}"
        )
        self.cutoff_len = cutoff_len
        self.question = question

    def __reduce__(self):
        # The workers of a data loader pickle their errors. By default, unpickling would call
        # __init__ with the message alone.
        return type(self), (self.cutoff_len, self.question)


@dataclass
class ExampleEncoder:
    """Tokenizes an example for training, or says that no answer is left.

    Args:
        processor: the processor of the checkpoint.
        cutoff_len: the largest number of text tokens.
        train_on_inputs: whether the question carries a loss too.
    """

    processor: LtuProcessor
    cutoff_len: int
    train_on_inputs: bool

    def __call__(self, example: dict) -> tuple[list[int], list[int]]:
        """Return tokens and labels, both (length <= cutoff_len,).

        Raises:
            NoAnswerError: no token of the answer is within the cutoff.
        """
        tokens, labels = self.processor.encode_example(
            example, self.cutoff_len, self.train_on_inputs
        )
        # A text that does not reach the cutoff is complete. Of the others, the number of tokens of
        # the prompt decides: with `train_on_inputs`, labels do not tell the answer from it.
        if len(tokens) == self.cutoff_len:
            rendered, _ = self.processor.example(example)
            if len(self.processor.encode(rendered.prompt)) >= self.cutoff_len:
                raise NoAnswerError(self.cutoff_len, example["instruction"])
        return tokens, labels


class QaDataset(Dataset):
    """Examples as tokens, labels and features.

    Args:
        examples: the examples, as `ltu.data.check_examples.read_examples` returns them.
        encode: example -> (tokens, labels), such as `ExampleEncoder`.
        load_features: example -> input of the audio encoder, such as `AudioFrontEnd.load_features`.
        max_bad: how many different examples this process may skip.
        lengths: (examples,) number of text tokens of each example within the cutoff, or None if it
            is not known.
        numbers: (examples,) number of each example in its dataset file, from 0. By default it is
            its position in `examples`.
        has_no_answer: (examples,) whether it is known that no answer is left within the cutoff.
            Such examples count as skipped from the start.

    Attributes:
        read_encoded: example -> output of the audio encoder (tokens, audio hidden), or None, in
            which case the features are loaded; such as `EncodedClips.read`.
    """

    def __init__(
        self,
        examples: Sequence[dict],
        encode: Callable,
        load_features: Callable,
        max_bad: int = 0,
        lengths: torch.Tensor | None = None,
        numbers: torch.Tensor | None = None,
        has_no_answer: torch.Tensor | None = None,
    ):
        self.examples = examples
        self.encode = encode
        self.load_features = load_features
        self.read_encoded: Callable[[dict], torch.Tensor | None] | None = None
        self.max_bad = max_bad
        self.lengths = lengths
        self.numbers = range(len(examples)) if numbers is None else numbers
        # Shared memory, because each worker of the data loader is a process of its own.
        self.is_bad = torch.zeros(len(examples), dtype=torch.bool).share_memory_()
        if has_no_answer is not None:
            self.is_bad |= has_no_answer

    def __len__(self) -> int:
        return len(self.examples)

    def name_of(self, index: int) -> str:
        """Return the number (from 1, in the dataset file) and the clip of an example."""
        return f"{self._number(index)} ({self.examples[index]['audio_id']})"

    @property
    def skipped(self) -> list[str]:
        """The `audio_id` of every example that was skipped so far, or its number without audio."""
        names = []
        for index in self.is_bad.nonzero()[:, 0].tolist():
            example = self.examples[index]
            has_audio = example["audio"] is not None
            names.append(example["audio_id"] if has_audio else f"example {self._number(index)}")
        return names

    def _number(self, index: int) -> int:
        """Return the number of an example in its dataset file, from 1."""
        return int(self.numbers[index]) + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return an example, or the next one that can be used.

        Returns:
            As `load`.

        Raises:
            DatasetError: more than `max_bad` examples or all examples cannot be used.
        """
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                return self.load(candidate)
            except (AudioError, NoAnswerError) as error:
                self._skip(candidate, error)
        raise DatasetError(
            f"None of the {len(self)} examples has a clip that can be decoded and an answer within "
            "--cutoff_len."
        )

    def load(self, index: int) -> dict[str, Any]:
        """Return an example.

        Returns:
            `input_ids` and `labels`, lists of the same length; `input_features`, the input of the
            audio encoder, and `audio_hidden_states`, its output. One of them is None, both are for
            an example without audio.

        Raises:
            AudioError, NoAnswerError: it cannot be used.
        """
        example = self.examples[index]
        tokens, labels = self.encode(example)
        features = None
        hidden = None
        if example["audio"] is not None:
            if self.read_encoded is not None:
                hidden = self.read_encoded(example)
            if hidden is None:
                features = self.load_features(example)
        return {
            "input_ids": tokens,
            "labels": labels,
            "input_features": features,
            "audio_hidden_states": hidden,
        }

    def _skip(self, index: int, error: AudioError | NoAnswerError) -> None:
        """Mark an example as skipped.

        Raises:
            DatasetError: more than `max_bad` examples were skipped.
        """
        number = self._number(index)
        if not self.is_bad[index]:
            self.is_bad[index] = True
            logger.warning("Example %d skipped: %s", number, error)
        num_bad = int(self.is_bad.sum())
        if num_bad > self.max_bad:
            raise DatasetError(
                "Examples whose clip cannot be decoded, or without an answer within --cutoff_len: "
                f"{num_bad}, more than --max_bad {self.max_bad}. The last: example {number}: "
                f"{error} Fix the dataset file (--check_audio looks for such clips at the start), "
                "raise --cutoff_len, or allow more with --max_bad."
            ) from error
