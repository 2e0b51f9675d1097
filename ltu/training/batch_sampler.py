"""Assigns examples to micro-batches, over all epochs and ranks, and counts the optimizer steps.

One sampler covers all epochs: micro-batches that are left over at the end of an epoch join the
first step of the next one, as in the original. The number of steps follows the original's formula,
T = epochs * (micro-batches of a rank // accumulation), which the released logs fit exactly.

Every rank shuffles with the same seed and so has the same order. (In the original each rank
shuffled on its own, so that an epoch covered about 68 % of the examples.) Rank r takes the
micro-batches r, r + world_size, and so on: two ranks process in one step the examples that one
process with doubled accumulation does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil

import torch
from torch import Tensor

# The original groups by length with the batch of one of its four ranks. Its megabatch of 50 such
# batches is therefore 12.5 steps long, which is the sawtooth of the released logs.
ORIGINAL_RANKS = 4
MAX_BATCHES_IN_MEGABATCH = 50  # As in transformers' get_length_grouped_indices.


def batches_per_rank(num_examples: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of micro-batches of one rank in one epoch of `num_examples` examples."""
    examples_per_rank = ceil(num_examples / world_size)
    return ceil(examples_per_rank / micro_batch_size)


def total_steps(
    num_examples: int, micro_batch_size: int, accumulation: int, world_size: int, epochs: int
) -> int:
    """Return the number of optimizer steps of a whole run, which is at least one per epoch."""
    batches = batches_per_rank(num_examples, micro_batch_size, world_size)
    steps_per_epoch = max(1, batches // accumulation)
    return epochs * steps_per_epoch


@dataclass
class StepPlan:
    """The sizes of a run that follow from its flags and the number of examples.

    Args:
        num_examples: the number of examples.
        micro_batch_size: examples in one forward pass of one rank.
        accumulation: micro-batches of a rank in one optimizer step.
        world_size: the number of ranks.
        epochs: how often every example is to be used.
        max_steps: optimizer steps, instead of those of the epochs, if positive.
    """

    num_examples: int
    micro_batch_size: int
    accumulation: int
    world_size: int
    epochs: int
    max_steps: int = -1

    @property
    def examples_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.world_size

    @property
    def batches_per_epoch(self) -> int:
        """The number of micro-batches of one rank in an epoch."""
        return batches_per_rank(self.num_examples, self.micro_batch_size, self.world_size)

    @property
    def ranks_of_order(self) -> int | None:
        """The number of ranks if the order of examples depends on it, else None.

        Where all micro-batches of an epoch are full, any number of ranks has the same order.
        """
        if self.num_examples % (self.micro_batch_size * self.world_size) == 0:
            return None
        return self.world_size

    @property
    def total_steps(self) -> int:
        if self.max_steps > 0:
            return self.max_steps
        return total_steps(
            self.num_examples,
            self.micro_batch_size,
            self.accumulation,
            self.world_size,
            self.epochs,
        )

    @property
    def total_batches(self) -> int:
        """The number of micro-batches that one rank uses."""
        return self.total_steps * self.accumulation

    @property
    def epochs_needed(self) -> int:
        """The number of epochs that are begun."""
        return ceil(self.total_batches / self.batches_per_epoch)

    @property
    def num_left_out(self) -> int:
        """The number of examples that the last epoch does not reach."""
        batches = self.total_batches % self.batches_per_epoch
        if batches == 0:
            return 0
        return max(0, self.num_examples - batches * self.micro_batch_size * self.world_size)

    def check(self, batch_size: int) -> None:
        """Raise a ValueError if a step needs more examples than there are."""
        if self.examples_per_step > self.num_examples:
            raise ValueError(
                f"--batch_size {batch_size} is more than the {self.num_examples} examples to train "
                f"on: a step would use some of them twice. Lower --batch_size to at most "
                f"{self.num_examples}."
            )

    def describe(self, batch_size: int) -> list[str]:
        """Return the lines that a run prints about its steps."""
        num_epochs = self.total_batches / self.batches_per_epoch
        lines = [
            f"examples: {self.num_examples}; steps: {self.total_steps} of {self.examples_per_step} "
            f"examples; micro-batches of a rank in a step: {self.accumulation} of "
            f"{self.micro_batch_size}; ranks: {self.world_size}; epochs: {num_epochs:.4g}"
        ]
        if self.examples_per_step != batch_size:
            lines.append(
                f"note: --batch_size {batch_size} is no multiple of micro-batch size x ranks "
                f"({self.micro_batch_size} x {self.world_size}), so a step has "
                f"{self.examples_per_step} examples"
            )
        if self.num_left_out:
            lines.append(
                f"note: {self.num_left_out} of {self.num_examples} examples are left out in the "
                "last epoch, because they fill no step"
            )
        return lines


class MicroBatchSampler:
    """Batch sampler of one rank over all epochs.

    Args:
        num_examples: the number of examples.
        micro_batch_size: examples in one forward pass.
        accumulation: micro-batches of a rank in one optimizer step.
        epochs: how often every example is used.
        lengths: (examples,) number of text tokens of each example. If given, examples of similar
            length are batched together, within megabatches of 12.5 steps.
        seed: seed of the shuffle, to which the number of the epoch is added.
        total_batches: the number of micro-batches after which the sampler ends; by default that of
            all epochs.
    """

    def __init__(
        self,
        num_examples: int,
        micro_batch_size: int,
        accumulation: int = 1,
        epochs: int = 1,
        lengths: Tensor | None = None,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        total_batches: int | None = None,
    ):
        self.num_examples = num_examples
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.epochs = epochs
        self.lengths = lengths
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.per_epoch = batches_per_rank(num_examples, micro_batch_size, world_size)
        self.total_batches = total_batches or epochs * self.per_epoch

    def __len__(self) -> int:
        return self.total_batches

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._batches_of_epochs(), self.total_batches)

    def _batches_of_epochs(self) -> Iterator[list[int]]:
        for epoch in range(self.epochs):
            yield from self._batches_of_rank(self.order(epoch))

    def step_batches(self, step: int) -> list[list[int]]:
        """Return the micro-batches of an optimizer step, counted from 0."""
        first = step * self.accumulation
        return list(islice(self, first, first + self.accumulation))

    def order(self, epoch: int) -> Tensor:
        """Return the order of all examples in an epoch, (examples,), the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.num_examples, generator=generator)  # (examples,)
        if self.lengths is None:
            return order
        return self._group_by_length(order)

    def _group_by_length(self, order: Tensor) -> Tensor:
        """Sort the examples of each megabatch by length, the longest first, (examples,).

        The result equals that of transformers' `get_length_grouped_indices`, which would hold
        millions of Python integers three times.
        """
        batch_size = self.micro_batch_size * self.accumulation * self.world_size
        batch_size = max(1, batch_size // ORIGINAL_RANKS)
        batches_in_megabatch = min(self.num_examples // (batch_size * 4), MAX_BATCHES_IN_MEGABATCH)
        megabatch_size = batch_size * max(1, batches_in_megabatch)

        # Sort by megabatch, then by decreasing length. A stable sort keeps the shuffled order of
        # examples of the same length.
        lengths = self.lengths[order].long()  # (examples,)
        longest = lengths.max()
        megabatch = torch.arange(self.num_examples) // megabatch_size  # (examples,)
        key = megabatch * (longest + 1) + (longest - lengths)  # (examples,)
        order = order[key.argsort(stable=True)]

        # Move the longest example to the front, where it shows at once whether memory is enough.
        heads = order[::megabatch_size]  # (megabatches,) the longest example of each
        longest_position = int(self.lengths[heads].argmax()) * megabatch_size
        order[[0, longest_position]] = order[[longest_position, 0]]
        return order

    def _batches_of_rank(self, order: Tensor) -> Iterator[list[int]]:
        """Yield the micro-batches of this rank.

        All ranks get the same number of examples. Where the number of examples is not divisible by
        the number of ranks, the first examples of the order are repeated at its end.
        """
        examples_per_rank = ceil(len(order) / self.world_size)
        start = 0
        for batch in range(self.per_epoch):
            examples_left = examples_per_rank - batch * self.micro_batch_size
            size = min(self.micro_batch_size, examples_left)
            begin = start + self.rank * size
            positions = torch.arange(begin, begin + size) % len(order)  # (size,)
            yield order[positions].tolist()
            start += self.world_size * size
