"""Rows -> a padded batch.

Notable:
- `[audio][pads][text]`, text padded on the left to a multiple of 8, as the original lays it out.
- With `original_positions`, positions count pads as the original's training does, and `<s>` carries a label wherever a
  pad stands before it: there the original predicts it, from the pad. (The pads of a row without audio see nothing, so
  what they predict depends on the attention kernel; eager equals the original.) Otherwise positions count what the mask
  shows and `<s>` carries no label.
"""

from typing import Any

import torch
from torch import Tensor

from ltu.models.processing_ltu import IGNORED, LtuProcessor


class LtuCollator:
    """Pad items of `QaDataset` into what `LtuForConditionalGeneration.forward` takes.

    Args:
        processor: lays out the sequence.
        original_positions: restore the original's positions and labels of pads.
        multiple_of: the text part is padded to a multiple of this.
    """

    def __init__(
        self, processor: LtuProcessor, original_positions: bool = False, multiple_of: int = 8
    ):
        self.processor = processor
        self.original_positions = original_positions
        self.multiple_of = multiple_of

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        clips = [item["input_features"] for item in items if item["input_features"] is not None]
        has_audio = [item["input_features"] is not None for item in items]
        batch = self.processor.pad_batch(
            [item["input_ids"] for item in items], has_audio, self.multiple_of
        )
        length = batch["input_ids"].shape[1]
        labels = torch.full_like(batch["input_ids"], IGNORED)  # (batch, tokens + text)
        for row, item in enumerate(items):
            start = length - len(item["labels"])
            labels[row, start:] = torch.tensor(item["labels"])
            pads = start - (self.processor.num_audio_tokens if clips else 0)
            starts_with_bos = item["input_ids"][0] == self.processor.tokenizer.bos_token_id
            if starts_with_bos and not (self.original_positions and pads):
                labels[row, start] = IGNORED
        batch["labels"] = labels
        if clips:
            batch["input_features"] = torch.stack(clips)  # (clips, frames, mel bins)
        if self.original_positions:
            batch["position_ids"] = torch.arange(length).repeat(
                len(items), 1
            )  # (batch, tokens + text)
        return batch


def describe_batch(batch: dict[str, Tensor], processor: LtuProcessor) -> str:
    """A batch as the model gets it: a line for each token with its place, id, text, kind and whether it carries loss.

    A token is `audio`, `pad`, `prompt` or `answer`.
    """
    lines = [f"{name}: {tuple(value.shape)} {value.dtype}" for name, value in batch.items()]
    positions = batch.get("position_ids", (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    for row, ids in enumerate(batch["input_ids"].tolist()):
        lines.append(f"--- row {row}")
        answer_from = _start_of_answer(ids, processor)
        for column, token in enumerate(ids):
            mask, label = (
                int(batch["attention_mask"][row, column]),
                int(batch["labels"][row, column]),
            )
            visible = "answer" if column >= answer_from else "prompt"
            kind = "audio" if token == processor.audio_token_id else visible if mask else "pad"
            text = "" if kind == "audio" else repr(processor.tokenizer.decode([token]))
            place = f"{column:4d}  position {int(positions[row, column]):4d}"
            lines.append(
                f"{place}  {token:6d}  {kind:6s}  loss {'no ' if label == IGNORED else 'yes'}  {text}"
            )
    return "\n".join(lines)


def _start_of_answer(ids: list[int], processor: LtuProcessor) -> int:
    """The first place behind what follows a question; the length of `ids` if a cutoff ended the text before it."""
    question = "\ufdd2"  # A code point that no text holds and that is no mark of ltu.models.prompt_template.
    mark = processor.prompt(question).rpartition(question)[2]
    for place in range(1, len(ids)):
        text = [token for token in ids[:place] if token != processor.audio_token_id]
        if processor.tokenizer.decode(text).endswith(mark):
            return place
    return len(ids)
