"""Pads examples into a batch.

A row of a batch is `[audio][padding][text]`. The text part is padded on the left to a multiple of
8, as in the original.

With `original_positions`, positions count padding, and `<s>` carries a label wherever padding
precedes it: the original trains the model to predict `<s>` from the padding. (The padding of an
example without audio attends to nothing, so that its prediction depends on the attention kernel;
eager attention equals the original.) Without it, positions count only what the attention mask
shows, and `<s>` carries no label.
"""

from typing import Any

import torch
from torch import Tensor

from ltu.models.configuration_ltu import IGNORED
from ltu.models.processing_ltu import LtuProcessor


class LtuCollator:
    """Pad items of `QaDataset` into the arguments of `LtuForConditionalGeneration.forward`.

    Args:
        processor: the processor that pads the token sequences.
        original_positions: use the original's positions and labels of padding.
        multiple_of: the text part is padded to a multiple of this.
    """

    def __init__(
        self, processor: LtuProcessor, original_positions: bool = False, multiple_of: int = 8
    ):
        self.processor = processor
        self.original_positions = original_positions
        self.multiple_of = multiple_of

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [item["input_ids"] for item in items]
        clips = stack_clips(items)
        has_audio = [
            item["input_features"] is not None or item.get("audio_hidden_states") is not None
            for item in items
        ]
        batch = self.processor.pad_batch(texts, has_audio, self.multiple_of)
        batch["labels"] = self._pad_labels(items, batch["input_ids"], bool(clips))
        batch |= clips
        if self.original_positions:
            length = batch["input_ids"].shape[1]
            positions = torch.arange(length)
            batch["position_ids"] = positions.repeat(len(items), 1)  # (batch, tokens + text)
        return batch

    def _pad_labels(
        self, items: list[dict[str, Any]], input_ids: Tensor, batch_has_audio: bool
    ) -> Tensor:
        """Return the labels of a padded batch, (batch, tokens + text)."""
        labels = torch.full_like(input_ids, IGNORED)
        length = input_ids.shape[1]
        num_audio_tokens = self.processor.num_audio_tokens if batch_has_audio else 0
        bos_token_id = self.processor.tokenizer.bos_token_id
        for row, item in enumerate(items):
            start = length - len(item["labels"])
            labels[row, start:] = torch.tensor(item["labels"])

            # Remove the label of <s>, unless the original would predict it from padding.
            num_padding = start - num_audio_tokens
            starts_with_bos = item["input_ids"][0] == bos_token_id
            predicts_bos = self.original_positions and num_padding != 0
            if starts_with_bos and not predicts_bos:
                labels[row, start] = IGNORED
        return labels


def stack_clips(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the clips of items of `QaDataset` as arguments of the model.

    Returns:
        `input_features` (clips, frames, mel bins) of clips that are to be encoded, if there are
        any. If others are encoded already, `audio_hidden_states` (clips, tokens, audio hidden), and
        `audio_index`, the clip of each item with audio: encoded ones come first.
    """
    features = []
    hidden = []
    is_encoded = []  # Of the items with audio.
    for item in items:
        if item.get("audio_hidden_states") is not None:
            hidden.append(item["audio_hidden_states"])
            is_encoded.append(True)
        elif item["input_features"] is not None:
            features.append(item["input_features"])
            is_encoded.append(False)
    clips = {}
    if features:
        clips["input_features"] = torch.stack(features)
    if hidden:
        clips["audio_hidden_states"] = torch.stack(hidden)
        clips["audio_index"] = index_clips(torch.tensor(is_encoded))
    return clips


def index_clips(is_encoded: Tensor) -> Tensor:
    """Return the position of each clip, (clips,), where those that are encoded come first.

    Args:
        is_encoded: (clips,) bool, in the order of the rows.
    """
    order = is_encoded.logical_not().int().argsort(stable=True)  # (clips,) the clip of a position
    return order.argsort()


def describe_batch(batch: dict[str, Tensor], processor: LtuProcessor) -> str:
    """Describe a batch as the model gets it.

    Each token is one line with its column, position, id, kind, whether it carries loss, and its
    text. The kind is `audio`, `pad`, `prompt` or `answer`.
    """
    lines = [f"{name}: {tuple(value.shape)} {value.dtype}" for name, value in batch.items()]
    mask = batch["attention_mask"]  # (batch, tokens + text)
    positions = batch.get("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
    for row, tokens in enumerate(batch["input_ids"].tolist()):
        lines.append(f"--- row {row}")
        answer_start = _find_answer_start(tokens, processor)
        for column, token in enumerate(tokens):
            if token == processor.audio_token_id:
                kind = "audio"
            elif not mask[row, column]:
                kind = "pad"
            elif column >= answer_start:
                kind = "answer"
            else:
                kind = "prompt"
            text = "" if kind == "audio" else repr(processor.tokenizer.decode([token]))
            has_loss = "no " if batch["labels"][row, column] == IGNORED else "yes"
            position = int(positions[row, column])
            lines.append(
                f"{column:4d}  position {position:4d}  {token:6d}  {kind:6s}  loss {has_loss}  "
                f"{text}"
            )
    return "\n".join(lines)


def _find_answer_start(tokens: list[int], processor: LtuProcessor) -> int:
    """Return the first column of the answer.

    The answer follows what the prompt template puts after the question. If the cutoff ended the
    text before the answer, the result is the number of tokens.
    """
    # A code point that no text contains and that ltu.models.prompt_template does not use.
    question = "\ufdd2"
    prompt_end = processor.prompt(question).rpartition(question)[2]
    for column in range(1, len(tokens)):
        text = [token for token in tokens[:column] if token != processor.audio_token_id]
        if processor.tokenizer.decode(text).endswith(prompt_end):
            return column
    return len(tokens)
