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

from collections.abc import Iterator, Sequence
from math import ceil

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

# The original groups by the batch of one of its four ranks, so a megabatch is 12.5 steps: the sawtooth of the released
# logs.
ORIGINAL_RANKS = 4


def batches_per_rank(rows: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches of one rank in one epoch."""
    return ceil(ceil(rows / world_size) / micro_batch_size)


def total_steps(rows: int, micro_batch_size: int, accumulation: int, world_size: int, epochs: int) -> int:
    """Optimizer steps of a whole run, at least one an epoch."""
    return epochs * max(1, batches_per_rank(rows, micro_batch_size, world_size) // accumulation)


class MicroBatches:
    """Batch sampler of one rank over all epochs.

    Args:
        lengths: text ids of each row; without grouping, anything as long.
        micro_batch_size: rows in one forward pass.
        accumulation: micro-batches of a rank in one optimizer step.
        epochs: passes over all rows.
        group_by_length: sort rows of like length together, within megabatches of 12.5 steps.
        seed: of the shuffle; the epoch number is added.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        micro_batch_size: int,
        accumulation: int = 1,
        epochs: int = 1,
        group_by_length: bool = False,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.lengths = lengths
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.epochs = epochs
        self.group_by_length = group_by_length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.per_epoch = batches_per_rank(len(lengths), micro_batch_size, world_size)

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self.epochs):
            yield from self._split(self.order(epoch))

    def order(self, epoch: int) -> list[int]:
        """All rows in the order of an epoch, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if not self.group_by_length:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        global_batch = self.micro_batch_size * self.accumulation * self.world_size
        return get_length_grouped_indices(self.lengths, max(1, global_batch // ORIGINAL_RANKS), generator=generator)

    def _split(self, order: list[int]) -> Iterator[list[int]]:
        """This rank's share. The first rows come again at the end, where the ranks would have unequal shares."""
        per_rank = ceil(len(order) / self.world_size)
        order = (order * self.world_size)[: per_rank * self.world_size]
        start = 0
        for batch in range(self.per_epoch):
            size = min(self.micro_batch_size, per_rank - batch * self.micro_batch_size)
            begin = start + self.rank * size
            yield order[begin : begin + size]
            start += self.world_size * size
