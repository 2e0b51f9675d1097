"""Opens the dataset of a run: checks it, splits it, and says what is in it.

What is trained must be visible before it is trained: how many examples have audio, and how many
answers are cut by `--cutoff_len`. A dataset without any audio is an error unless `--text_only`
says that it is meant.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from ltu.data.audio import AudioError
from ltu.data.check_examples import (
    check_audio,
    check_num_errors,
    parse_ignored_keys,
    read_examples,
)
from ltu.data.dataset_io import describe_columns, hash_source
from ltu.data.dataset_parser import DatasetError
from ltu.data.dataset_source import find_dataset
from ltu.models.processing_ltu import LtuProcessor
from ltu.training.arguments import DataArguments, RunArguments
from ltu.training.dataset import ExampleEncoder, NoAnswerError, QaDataset
from ltu.training.dataset_index import (
    EXAMPLES_AT_ONCE,
    IndexedExamples,
    count_tokens,
    find_index,
)

logger = logging.getLogger(__name__)

MAX_UNINDEXED = 100_000  # Examples that are tokenized at the start of a run, in half a minute.
MIN_PROGRESS_BAR = 20_000  # Examples; fewer are tokenized without a progress bar.
MAX_LISTED = 10  # Examples in a message.

Examples = list[dict] | IndexedExamples


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset file contains.

    Attributes:
        name: of the dataset file, without its folder.
        sha256: of the dataset file, also if only its index is there; of a table, see
            `ltu.data.dataset_io.hash_source`.
        num_examples: examples, also those that are held out.
        num_with_audio: examples that have a clip.
        num_clips: distinct clips.
        cutoff_len: the largest number of text tokens of an example.
        num_truncated: answers of which the cutoff cuts tokens (the end token counts), also those
            that it cuts completely; None if it is not known, because more than `MAX_UNINDEXED`
            examples have no index.
        num_without_answer: answers that are cut completely; None as above.
        columns: which columns are used for what, and which are not used; empty for a file whose
            keys are those of examples.
    """

    name: str
    sha256: str
    num_examples: int
    num_with_audio: int
    num_clips: int
    cutoff_len: int
    num_truncated: int | None
    num_without_answer: int | None
    columns: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Return what `--plan` and the start of training print."""
        num_without_audio = self.num_examples - self.num_with_audio
        audio = (
            f"{self.name}: {self.num_examples} examples, {self.num_with_audio} with audio "
            f"({self.num_clips} clips), {num_without_audio} without"
        )
        answers = f"answers cut by --cutoff_len {self.cutoff_len}: {self.num_truncated}"
        if self.num_truncated is None:
            answers = (
                f"answers cut by --cutoff_len {self.cutoff_len}: not known without an index "
                "(python -m ltu.index_dataset)"
            )
        elif self.num_without_answer:
            answers += f", {self.num_without_answer} of them completely, which are skipped"
        return [audio, *self.columns, answers]


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of text tokens of examples, before any cutoff.

    Attributes:
        all: (examples,) with the answer and the end token.
        prompt: (examples,) of the prompt.
    """

    all: Tensor
    prompt: Tensor

    def truncated(self, cutoff_len: int) -> Tensor:
        """Return whether tokens of the answer are cut, (examples,) bool."""
        return self.all > cutoff_len

    def without_answer(self, cutoff_len: int) -> Tensor:
        """Return whether no token of the answer is left, (examples,) bool."""
        return self.prompt >= self.all.clamp(max=cutoff_len)


def make_datasets(
    data: DataArguments, run: RunArguments, processor: LtuProcessor
) -> tuple[QaDataset, QaDataset | None, DatasetSummary]:
    """Open the dataset file, or its index, and split it.

    Returns:
        The training examples, the held-out ones or None, and a summary of both together. The
        training examples are in the order of the file if none are held out.

    Raises:
        ValueError: the dataset file, its index or, with `--check_audio`, a clip is not valid; no
            example has audio; more than `--max_bad` answers are cut completely; or
            `--val_set_size` leaves no example to train on.
    """
    examples = _open_examples(data, processor)
    counts = _count_tokens(examples, processor)
    summary = _summarize(examples, counts, data)
    _check_audio_of(summary, data.text_only)
    if counts is not None:
        _check_answers(examples, counts, data)
    if data.check_audio:
        errors = check_audio(examples, processor.front_end.downmix)
        check_num_errors(errors, data.data_path)
    num_train = len(examples) - data.val_set_size
    if num_train <= 0:
        raise ValueError(
            f"--val_set_size {data.val_set_size} leaves none of the {len(examples)} examples of "
            f"{data.data_path}."
        )

    # All examples in the order of the file, or a random split.
    numbers = torch.arange(len(examples))  # (examples,)
    if data.val_set_size > 0:
        generator = torch.Generator().manual_seed(run.seed)
        numbers = torch.randperm(len(examples), generator=generator)
    train, held_out = numbers.split([num_train, data.val_set_size])
    train_set = _take_examples(examples, counts, train, data, processor)
    held_out_set = None
    if data.val_set_size > 0:
        held_out_set = _take_examples(examples, counts, held_out, data, processor)

    if run.group_by_length and train_set.lengths is None:
        logger.warning(
            "%d examples without an index: their order is random, not grouped by length. "
            "For --group_by_length, first: python -m ltu.index_dataset %s --base_model DIR",
            len(train_set),
            data.data_path,
        )
    return train_set, held_out_set, summary


def _open_examples(data: DataArguments, processor: LtuProcessor) -> Examples:
    """Return the examples of the index, if there is one, or of the dataset file."""
    ignored_keys = parse_ignored_keys(data.ignored_keys)
    indexed = find_index(data.data_path, data.audio_root, data)
    if indexed is not None:
        indexed.check(processor)
        return indexed
    examples = read_examples(
        data.data_path, data.audio_root, ignored_keys=ignored_keys, columns=data
    )
    errors: dict[str, AudioError] = {}
    examples = processor.front_end.add_transcripts(examples, errors)
    check_num_errors(errors, data.data_path, data.max_bad)
    return examples


def _count_tokens(examples: Examples, processor: LtuProcessor) -> TokenCounts | None:
    """Return the numbers of tokens of an index, or tokenize a small dataset; else return None."""
    if isinstance(examples, IndexedExamples):
        return TokenCounts(examples.num_tokens, examples.num_prompt_tokens)
    if len(examples) > MAX_UNINDEXED:
        return None
    num_tokens: list[int] = []
    num_prompt_tokens: list[int] = []
    known: dict[str, int] = {}
    is_quick = len(examples) < MIN_PROGRESS_BAR
    with tqdm(total=len(examples), desc="tokenizing", unit="example", disable=is_quick) as bar:
        for block in _blocks(examples):
            of_examples, of_prompts = count_tokens(block, processor, known)
            num_tokens += of_examples
            num_prompt_tokens += of_prompts
            bar.update(len(block))
    return TokenCounts(
        torch.tensor(num_tokens, dtype=torch.int32),
        torch.tensor(num_prompt_tokens, dtype=torch.int32),
    )


def _blocks(examples: list[dict]) -> Iterator[list[dict]]:
    remaining = iter(examples)
    while block := list(islice(remaining, EXAMPLES_AT_ONCE)):
        yield block


def _summarize(
    examples: Examples, counts: TokenCounts | None, data: DataArguments
) -> DatasetSummary:
    if isinstance(examples, IndexedExamples):
        name = examples.about["source"]
        digest = examples.about["sha256"]
        num_with_audio, num_clips = examples.count_audio()
        columns = examples.about.get("described", [])
    else:
        source = find_dataset(data.data_path, data.split)
        name = source.short_name
        digest = hash_source(source, data)
        columns = describe_columns(source, data)
        audio_ids = [example["audio_id"] for example in examples if example["audio"] is not None]
        num_with_audio = len(audio_ids)
        num_clips = len(set(audio_ids))
    num_truncated = None
    num_without_answer = None
    if counts is not None:
        num_truncated = int(counts.truncated(data.cutoff_len).sum())
        num_without_answer = int(counts.without_answer(data.cutoff_len).sum())
    return DatasetSummary(
        name=name,
        sha256=digest,
        num_examples=len(examples),
        num_with_audio=num_with_audio,
        num_clips=num_clips,
        cutoff_len=data.cutoff_len,
        num_truncated=num_truncated,
        num_without_answer=num_without_answer,
        columns=tuple(columns),
    )


def _check_audio_of(summary: DatasetSummary, text_only: bool) -> None:
    """Check that the dataset has audio, or that `--text_only` says that it has none.

    Raises:
        DatasetError: it is otherwise.
    """
    if summary.num_with_audio == 0 and not text_only:
        raise DatasetError(
            f"None of the {summary.num_examples} examples of {summary.name} has audio: every "
            'audio_id is "empty" or null. Write the paths of the clips into audio_id; if the model '
            "is to be trained on text only: --text_only True"
        )
    if summary.num_with_audio > 0 and text_only:
        raise DatasetError(
            f"--text_only True, but {summary.num_with_audio} of the {summary.num_examples} "
            f"examples of {summary.name} have audio. Leave the flag out."
        )


def _check_answers(examples: Examples, counts: TokenCounts, data: DataArguments) -> None:
    """Check how many answers the cutoff cuts completely, and log the first of them.

    Raises:
        DatasetError: they are more than `--max_bad`.
    """
    bad = counts.without_answer(data.cutoff_len).nonzero()[:, 0].tolist()
    listed = []
    for number in bad[:MAX_LISTED]:
        reason = NoAnswerError(data.cutoff_len, examples[number]["instruction"])
        listed.append(f"Example {number + 1}: {reason}")
    if len(bad) > data.max_bad:
        details = "\n".join(listed)
        raise DatasetError(
            f"{len(bad)} of the {len(examples)} examples of {data.data_path} have no answer within "
            f"--cutoff_len, more than --max_bad {data.max_bad}:\n{details}\n"
            "Raise --cutoff_len, shorten these questions, or allow so many with --max_bad."
        )
    for line in listed:
        logger.warning("Skipped: %s", line)


def _take_examples(
    examples: Examples,
    counts: TokenCounts | None,
    numbers: Tensor,
    data: DataArguments,
    processor: LtuProcessor,
) -> QaDataset:
    """Return the dataset of the examples with these numbers, (n,)."""
    if isinstance(examples, IndexedExamples):
        part = examples.take(numbers)
    else:
        part = [examples[number] for number in numbers.tolist()]
    lengths = None
    has_no_answer = None
    if counts is not None:
        lengths = counts.all[numbers].clamp(max=data.cutoff_len)  # (n,)
        has_no_answer = counts.without_answer(data.cutoff_len)[numbers]  # (n,)
    return QaDataset(
        part,
        encode=ExampleEncoder(processor, data.cutoff_len, data.train_on_inputs),
        load_features=processor.front_end.load_features,
        max_bad=data.max_bad,
        lengths=lengths,
        numbers=numbers,
        has_no_answer=has_no_answer,
    )
