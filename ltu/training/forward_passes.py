"""Runs the micro-batches of an optimizer step in passes of another size.

The papers' loss is a mean of means: the mean over the labelled tokens of each micro-batch, and the
mean of these over the micro-batches of a step. That defines the result. How many rows go through
the model in one forward and backward pass is a matter of the machine: a GPU computes 32 rows in
little more time than 4. So a pass holds several micro-batches, or a part of one. Each token weighs
one over the number of labelled tokens of its own micro-batch, and keeps the position and the label
that the padding of its own micro-batch gives it.

    micro-batch 1   A A . 1 2        pass   . A A . 1 2      A  audio
                    A A 1 2 3               . A A 1 2 3      .  padding
    micro-batch 2   A A 1 2 3 4             A A 1 2 3 4
                    A A . . 1 2             A A . . 1 2

Without dropout, losses, gradients and weights are those of one micro-batch at a time, but for
rounding. With dropout they are equal in distribution, because random numbers depend on the shape.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from ltu.models.configuration_ltu import IGNORED
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.provenance import read_record
from ltu.training.collator import index_clips
from ltu.training.sharding import ShardedTrainer

# What fills the tensors (rows, length) of a micro-batch when they become longer. `input_ids` are
# filled with any token, because the mask hides it.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "position_ids": 0}
# The tensors of clips: outputs of the audio encoder, and its input. In a batch the clips of the
# former come first.
CLIP_NAMES = ("audio_hidden_states", "input_features")

# The part of a GPU's memory that a pass may use. The rest is for fragmentation.
USABLE_MEMORY = 0.92
ADAMW_BYTES = 8  # Of a trained parameter: two moments in fp32.
DDP_BYTES = 4  # Of a trained parameter: the buckets of its gradient.


@dataclass
class Part:
    """Some rows of a micro-batch, which are computed in one pass.

    Attributes:
        tensors: (rows, length) of these rows, and (clips, ...) of their clips, as the collator
            makes them.
        number: of the micro-batch in the step, from 0.
        num_labelled: labelled tokens of the whole micro-batch.
        is_whole: whether these are all rows of the micro-batch.
    """

    tensors: dict[str, Tensor]
    number: int
    num_labelled: int
    is_whole: bool = True

    @property
    def num_rows(self) -> int:
        return len(self.tensors["input_ids"])

    @property
    def text_names(self) -> list[str]:
        """The names of the tensors (rows, length)."""
        return [name for name in PADDING if name in self.tensors]


def count_labelled(labels: Tensor) -> int:
    """Return the number of tokens that carry loss, of the labels (rows, length) of a micro-batch.

    Nothing predicts the first token of a row.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def split_micro_batch(part: Part, num_rows: int, audio_token_id: int) -> list[Part]:
    """Split a micro-batch into parts of so many rows, each with its clips."""
    has_audio = (part.tensors["input_ids"] == audio_token_id).any(1)  # (rows,)
    is_encoded = find_encoded(part.tensors)  # (clips,)
    parts = []
    for start in range(0, part.num_rows, num_rows):
        end = start + num_rows
        first_clip = int(has_audio[:start].sum())
        last_clip = int(has_audio[:end].sum())
        tensors = {name: part.tensors[name][start:end] for name in part.text_names}
        for name, is_here in zip(CLIP_NAMES, (is_encoded, ~is_encoded), strict=True):
            first = int(is_here[:first_clip].sum())
            last = int(is_here[:last_clip].sum())
            if last > first:
                tensors[name] = part.tensors[name][first:last]
        if "audio_hidden_states" in tensors:
            tensors["audio_index"] = index_clips(is_encoded[first_clip:last_clip])
        parts.append(Part(tensors, part.number, part.num_labelled, is_whole=False))
    return parts


def find_encoded(tensors: dict[str, Tensor]) -> Tensor:
    """Return whether each clip of a micro-batch is encoded already, (clips,), by rows."""
    if "audio_hidden_states" in tensors:
        return tensors["audio_index"] < len(tensors["audio_hidden_states"])
    return torch.zeros(len(tensors.get("input_features", ())), dtype=torch.bool)


def merge(parts: list[Part]) -> dict[str, Any]:
    """Merge micro-batches, or parts of them, into the input of one pass.

    Returns:
        The tensors of all rows, padded on the left to the longest, with `loss_tokens`, as
        `LtuForConditionalGeneration.forward` takes them; and `part_rows`, the number of rows of
        each part. Tensors of clips are lists with one tensor for each part that has clips, so that
        they are joined on the device.
    """
    length = max(part.tensors["input_ids"].shape[1] for part in parts)
    merged: dict[str, Any] = {}
    for name in parts[0].text_names:
        merged[name] = torch.cat([pad_part(part.tensors[name], name, length) for part in parts])
    for name in CLIP_NAMES:
        present = [part.tensors[name] for part in parts if name in part.tensors]
        if present:
            merged[name] = present
    if "audio_hidden_states" in merged:
        is_encoded = torch.cat([find_encoded(part.tensors) for part in parts])  # (clips,)
        merged["audio_index"] = index_clips(is_encoded)
    merged["part_rows"] = [part.num_rows for part in parts]
    num_labelled = torch.tensor([part.num_labelled for part in parts])
    merged["loss_tokens"] = num_labelled.repeat_interleave(torch.tensor(merged["part_rows"]))
    return merged


def pad_part(value: Tensor, name: str, length: int) -> Tensor:
    """Pad a tensor (rows, length of the part) on the left to (rows, `length`)."""
    num_padding = length - value.shape[1]
    value = F.pad(value, (num_padding, 0), value=PADDING[name])
    if name == "labels":
        # Nothing precedes the first token of a micro-batch. In the pass, padding does.
        value[:, num_padding] = IGNORED
    return value


def depends_on_length(tensors: dict[str, Tensor], audio_token_id: int) -> bool:
    """Return whether more padding would change the loss of a micro-batch.

    It does where `<s>` is predicted from padding in a row without audio (`--original_positions`):
    this padding attends to nothing, which attention kernels treat in different ways.
    """
    if "position_ids" not in tensors:
        return False
    has_audio = (tensors["input_ids"] == audio_token_id).any(1)  # (rows,)
    return not bool(has_audio.all())


def find_reason_to_keep(model: LtuForConditionalGeneration) -> str | None:
    """Return why the passes of this model must be micro-batches, or None if they need not be.

    Its loss must be a mean over tokens and nothing else.
    """
    language_model = model.language_model
    model_type = language_model.config.model_type
    if language_model.loss_function is not ForCausalLMLoss:
        return f"a {model_type} has a loss of its own"
    if getattr(language_model.config, "output_router_logits", False):
        return f"the loss of this {model_type} has a term of its router"
    return None


@dataclass
class StepBatches:
    """The micro-batches of a step, each of which is loaded when it is its turn.

    The stock list loads all of them before the first is computed, while the device waits.

    Args:
        loaded: yields micro-batches.
        count: how many of them are of this step.
    """

    loaded: Iterator[dict[str, Tensor]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return islice(self.loaded, self.count)


class PassTrainer(ShardedTrainer):
    """A Trainer whose forward and backward passes have another size than its micro-batches.

    `--rows_per_pass` is a number of rows, or "auto": on a GPU the largest number that fits, which
    is measured before the first step; elsewhere a micro-batch. If memory is not enough for a pass
    all the same, its step is computed again in passes of half the size.

    Args:
        longest_text: text tokens of the longest example, for the measured passes.

    Attributes:
        rows_per_pass: the largest number of rows of a pass; None until it is chosen.
        reason_to_keep: why passes must be micro-batches; None if they need not be.
        step_losses: () the loss of each part that was computed in the current step, in order.
        step_numbers: the micro-batch of each of these parts, from 0.

    Raises:
        ValueError: `--rows_per_pass` is a number, and the passes of this model must be
            micro-batches.
    """

    def __init__(self, *args: Any, longest_text: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.longest_text = longest_text
        self.rows_per_pass: int | None = None
        self.step_losses: list[Tensor] = []
        self.step_numbers: list[int] = []
        self._pass_losses: list[Tensor] = []  # Of the parts of the current pass, if it is merged.
        self._step: list[Part] = []  # The micro-batches of the current step so far.
        self._num_computed = 0  # How many of them are computed.
        self._returned_loss: Tensor | float = 0.0  # Of the current step so far.

        # With layers on several devices, the positions of the logits to keep can be on another
        # device than the hidden states, so that indexing fails.
        parameters = signature(self.model.language_model.forward).parameters
        device_map = getattr(self.model, "hf_device_map", {})
        self.is_on_one_device = len(set(device_map.values())) <= 1
        self.takes_logits_to_keep = "logits_to_keep" in parameters and self.is_on_one_device

        flag = self.args.rows_per_pass
        self.reason_to_keep = self._find_reason_to_keep()
        is_kept = self.reason_to_keep is not None
        if flag != "auto":
            self.rows_per_pass = int(flag)
            if is_kept and self.rows_per_pass != self.args.micro_batch_size:
                raise ValueError(
                    f"--rows_per_pass {flag}: {self.reason_to_keep}. Leave the flag out."
                )
        elif is_kept or not self._can_measure():
            self.rows_per_pass = self.args.micro_batch_size

    def _find_reason_to_keep(self) -> str | None:
        """Return why passes must be micro-batches, or None if they need not be."""
        if self.is_fsdp_enabled and self.data_collator.original_positions:
            return "with --fsdp and --original_positions ranks could need unequal numbers of passes"
        if self.is_deepspeed_enabled:
            # accelerate calls DeepSpeed's step after each backward pass of the last micro-batch.
            return "DeepSpeed changes the weights after each pass of the last micro-batch of a step"
        if self.args.neftune_noise_alpha is not None:
            return "the noise of --neftune_noise_alpha depends on the length of a micro-batch"
        optimizer = self.args.optim.value
        if "lomo" in optimizer or optimizer.endswith("layerwise"):
            return f"--optim {optimizer} changes the weights in each backward pass"
        return find_reason_to_keep(self.model)

    def _can_measure(self) -> bool:
        """Return whether the memory of a pass can be measured: on one GPU for each process."""
        is_on_one_gpu = self.args.device.type == "cuda" and self.is_on_one_device
        return is_on_one_gpu and not self.is_fsdp_enabled

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[StepBatches, None]:
        """Return the micro-batches of a step, and no number of tokens: the loss is a mean."""
        return StepBatches(epoch_iterator, num_batches), None

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take a micro-batch, and compute the pass that it completes, if it does.

        Returns:
            () the loss of the pass, its share of the step; 0 if no pass is complete.
        """
        self._step.append(Part(inputs, len(self._step), count_labelled(inputs["labels"])))
        if self.rows_per_pass is None:
            self.rows_per_pass = self._measure_rows()
            self._announce()
        num_in_step = self.current_gradient_accumulation_steps
        is_last = len(self._step) == num_in_step
        num_waiting = len(self._step) - self._num_computed
        if not is_last and num_waiting < self._micro_batches_per_pass(num_in_step):
            return torch.zeros((), device=self.args.device)

        loss = self._compute(model, self._step[self._num_computed :])
        if loss is None:  # Memory was not enough.
            loss = self._compute_again(model) - self._returned_loss
        self._num_computed = len(self._step)
        self._returned_loss = self._returned_loss + loss
        if is_last:
            self._step = []
            self._num_computed = 0
            self._returned_loss = 0.0
        return loss

    def _micro_batches_per_pass(self, num_in_step: int) -> int:
        """Return the number of micro-batches of a pass, so that passes have about equal sizes."""
        largest = max(1, self.rows_per_pass // self.args.micro_batch_size)
        num_passes = ceil(num_in_step / largest)
        return ceil(num_in_step / num_passes)

    def _compute(self, model: torch.nn.Module, micro_batches: list[Part]) -> Tensor | None:
        """Compute micro-batches in as many passes as they need.

        Returns:
            () the sum of their losses, each divided by the number of micro-batches of the step; or
            None if memory was not enough.
        """
        loss: Tensor | float = 0.0
        passes = self._plan(micro_batches)
        for number, parts in enumerate(passes):
            # Processes exchange their gradients after the last pass of a step only.
            # With FSDP they do so after each pass, as `ShardedTrainer` says.
            is_last = number == len(passes) - 1
            context: AbstractContextManager = nullcontext()
            if not is_last and not self.is_fsdp_enabled:
                context = self.accelerator.no_sync(model)
            with context:
                try:
                    loss = loss + self._run_pass(model, parts)
                # Tensors that its traceback refers to are freed when this block is left.
                except torch.OutOfMemoryError as error:
                    self._check_repeatable(error)
                    return None
        return loss

    def _plan(self, micro_batches: list[Part]) -> list[list[Part]]:
        """Return the parts of each pass that computes these micro-batches."""
        audio_token_id = self.model.config.audio_token_id
        passes: list[list[Part]] = []
        num_rows = 0  # Of the last pass.
        is_open = False  # Whether the last pass can take more parts.
        for micro_batch in micro_batches:
            parts = [micro_batch]
            if micro_batch.num_rows > self.rows_per_pass:
                parts = split_micro_batch(micro_batch, self.rows_per_pass, audio_token_id)
            is_alone = depends_on_length(micro_batch.tensors, audio_token_id)
            for part in parts:
                if is_open and not is_alone and num_rows + part.num_rows <= self.rows_per_pass:
                    passes[-1].append(part)
                    num_rows += part.num_rows
                else:
                    passes.append([part])
                    num_rows = part.num_rows
                is_open = not is_alone
        return passes

    def _run_pass(self, model: torch.nn.Module, parts: list[Part]) -> Tensor:
        """Compute the loss of a pass and its gradients, which are added to those that exist."""
        self._pass_losses = []
        inputs: dict[str, Any] = parts[0].tensors
        if len(parts) > 1 or not parts[0].is_whole:
            inputs = merge(parts)
        loss = super().training_step(model, inputs)
        self.step_numbers += [part.number for part in parts]
        self.step_losses += self._pass_losses or [loss.detach()]
        return loss

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss of a pass: the sum of the mean losses of its micro-batches.

        Logits are computed only from the position before the first label on, because audio tokens
        and masked questions carry no loss.
        """
        inputs = inputs | {"use_cache": False}
        part_rows = inputs.pop("part_rows", None)
        for name, value in inputs.items():
            if isinstance(value, list):
                inputs[name] = torch.cat(value)
        if self.takes_logits_to_keep:
            labels = inputs["labels"]  # (rows, tokens + text)
            labelled = (labels != IGNORED).any(0).nonzero()  # (columns with a label, 1)
            first = int(labelled[0]) if len(labelled) else 0
            # Pass positions instead of a count: a count makes transformers slice, and the slice is
            # not contiguous. Its product with the vocabulary would then take a slow path on CPUs
            # that copies the weight for every position.
            start = max(first - 1, 0)
            keep = torch.arange(start, labels.shape[1], device=labelled.device)
            inputs = inputs | {"labels": labels[:, keep], "logits_to_keep": keep}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if part_rows is not None:
            losses = torch.stack([rows.sum() for rows in loss.split(part_rows)])  # (parts,)
            self._pass_losses = list(losses.detach().unbind())
            return losses.sum()
        return loss

    def _check_repeatable(self, error: torch.OutOfMemoryError) -> None:
        """Raise a ValueError if a step cannot be computed again in smaller passes."""
        # DistributedDataParallel cannot begin a pass before it has exchanged the gradients of the
        # one before, even if torchrun has started one process only.
        is_alone = self.accelerator.distributed_type == DistributedType.NO
        is_kept = self.reason_to_keep is not None
        if self.rows_per_pass > 1 and is_alone and not is_kept:
            return
        hint = "Lower --rows_per_pass"
        if is_kept:
            hint = f"It cannot be smaller: {self.reason_to_keep}. Add --gradient_checkpointing"
        raise ValueError(
            f"Memory is not enough for a pass of {self.rows_per_pass} rows ({error}). {hint}, or "
            "see --plan --gpu_memory for what fits."
        ) from error

    def _compute_again(self, model: torch.nn.Module) -> Tensor:
        """Compute the current step so far from its beginning, in passes of half the size or less.

        A backward pass that ended early has added a part of its gradients, which cannot be taken
        back.
        """
        loss = None
        while loss is None:
            self.rows_per_pass = max(1, self.rows_per_pass // 2)
            self._announce()
            model.zero_grad()
            self.step_losses = []
            self.step_numbers = []
            torch.cuda.empty_cache()
            loss = self._compute(model, self._step)
        return loss

    def _measure_rows(self) -> int:
        """Return the largest number of rows whose pass fits into the GPU, on every rank.

        Two passes of the longest text give the memory of a micro-batch, and a third one shows
        whether the number that follows is right.
        """
        device = self.args.device
        largest = self.current_gradient_accumulation_steps
        free, _ = torch.cuda.mem_get_info(device)
        usable = USABLE_MEMORY * (free + torch.cuda.memory_reserved(device))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if not self.optimizer.state:
            usable -= ADAMW_BYTES * trained
        if self.args.world_size > 1:
            usable -= DDP_BYTES * trained

        count = 1
        part = self._longest_micro_batch()
        first = self._measure_peak([part])
        second = self._measure_peak([part] * 2) if largest > 1 else None
        if first is not None and second is not None:
            count += int((usable - first) / max(1, second - first))
        count = max(1, min(count, largest))
        num_passes = ceil(largest / count)
        count = ceil(largest / num_passes)
        while count > 1:
            peak = self._measure_peak([part] * count)
            if peak is not None and peak <= usable:
                break
            count //= 2
        counts = self.accelerator.gather(torch.tensor([count], device=device))  # (ranks,)
        return int(counts.min()) * self.args.micro_batch_size

    def _measure_peak(self, parts: list[Part]) -> int | None:
        """Return the peak of memory in bytes of a pass, which trains nothing; None if memory is not
        enough for it.

        Processes exchange nothing here: one of them alone may have too little memory.
        """
        device = self.args.device
        torch.cuda.reset_peak_memory_stats(device)
        peak = None
        with torch.random.fork_rng(devices=[device]):
            try:
                # In a step, the passes before have left gradients.
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
                self._run_pass(self.model, parts)
                peak = torch.cuda.max_memory_allocated(device)
            # Tensors that its traceback refers to are freed when this block is left.
            except torch.OutOfMemoryError:
                pass
        self.model.zero_grad()
        self.step_losses = []
        self.step_numbers = []
        torch.cuda.empty_cache()
        return peak

    def _longest_micro_batch(self) -> Part:
        """Return a micro-batch of the longest text, with a clip in each row, all of zeros."""
        tokens = [0] * self.longest_text
        features = torch.zeros(self.model.config.audio_config.feature_shape)
        item = {"input_ids": tokens, "labels": tokens, "input_features": features}
        tensors = self.data_collator([item] * self.args.micro_batch_size)
        return Part(tensors, 0, count_labelled(tensors["labels"]))

    def _announce(self) -> None:
        """Print the size of a pass."""
        if self.is_world_process_zero():
            print(f"rows in a forward pass: {self.rows_per_pass}")

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint; with "auto", passes keep their size, so that results are the same."""
        super()._load_from_checkpoint(checkpoint, model)
        rows = read_record(Path(checkpoint)).get("rows_per_pass")
        # A micro-batch may come from a machine that could not measure.
        if self.rows_per_pass is None and rows != self.args.micro_batch_size:
            self.rows_per_pass = rows
