"""Which rows make up which micro-batch, over all epochs and ranks, and how many steps that gives.

Notable:
- One sampler runs over all epochs: micro-batches that an epoch leaves over join the first step of the next, as in the
  original.
- Steps follow the original's formula, T = epochs * (batches of a rank // accumulation); the released logs fit it
  exactly.
- Every rank draws from one shuffle with one seed. (In the original each rank shuffled on its own, so an epoch saw about
  68 % of the rows.)
- Rank r takes micro-batches r, r + world, ...: two ranks see in one step what one process sees with doubled
  accumulation.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor

# The original groups by the batch of one of its four ranks, so a megabatch is 12.5 steps: the sawtooth of the released
# logs.
ORIGINAL_RANKS = 4


def batches_per_rank(rows: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of one rank in one epoch."""
    return ceil(ceil(rows / world_size) / micro_batch_size)


def total_steps(
    rows: int, micro_batch_size: int, accumulation: int, world_size: int, epochs: int
) -> int:
    """Optimizer steps of a whole run, at least one an epoch."""
    return epochs * max(1, batches_per_rank(rows, micro_batch_size, world_size) // accumulation)


class MicroBatchSampler:
    """Batch sampler of one rank over all epochs.

    Args:
        rows: how many there are.
        micro_batch_size: rows in one forward pass.
        accumulation: micro-batches of a rank in one optimizer step.
        epochs: passes over all rows.
        lengths: (rows,) text ids of each; rows of like length come together then, within megabatches of 12.5 steps.
        seed: of the shuffle; the epoch number is added.
    """

    def __init__(
        self,
        rows: int,
        micro_batch_size: int,
        accumulation: int = 1,
        epochs: int = 1,
        lengths: Tensor | None = None,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.rows = rows
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.epochs = epochs
        self.lengths = lengths
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.per_epoch = batches_per_rank(rows, micro_batch_size, world_size)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self.epochs):
            yield from self._split(self.order(epoch))

    def order(self, epoch: int) -> Tensor:
        """(rows,) all rows in the order of an epoch, the same on every rank."""
        order = torch.randperm(
            self.rows, generator=torch.Generator().manual_seed(self.seed + epoch)
        )
        if self.lengths is None:
            return order
        # As transformers' get_length_grouped_indices, which would hold millions of Python's integers three times.
        batch = max(
            1, self.micro_batch_size * self.accumulation * self.world_size // ORIGINAL_RANKS
        )
        megabatch = batch * max(1, min(self.rows // (batch * 4), 50))
        lengths = self.lengths[order].long()
        key = torch.arange(self.rows) // megabatch * (lengths.max() + 1) + lengths.max() - lengths
        order = order[key.argsort(stable=True)]
        first = (
            int(self.lengths[order[::megabatch]].argmax()) * megabatch
        )  # The longest row comes first of all.
        order[[0, first]] = order[[first, 0]]
        return order

    def _split(self, order: Tensor) -> Iterator[list[int]]:
        """This rank's share. The first rows come again at the end, where the ranks would have unequal shares."""
        per_rank = ceil(len(order) / self.world_size)
        start = 0
        for batch in range(self.per_epoch):
            size = min(self.micro_batch_size, per_rank - batch * self.micro_batch_size)
            begin = start + self.rank * size
            yield order[torch.arange(begin, begin + size) % len(order)].tolist()
            start += self.world_size * size
