"""Checks the settings of generation, and adds per-row sampling, streaming and limits to stock
`generate`.

Answers are greedy by default. Sampling takes the random numbers of each row from a seed of its
own, so a sampled answer does not depend on the batch, its order, or whether a run was interrupted.
The text of each row can be streamed while it grows, and a row can be cancelled without the others.
"""

import hashlib
import random
import re
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import (
    BaseStreamer,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# The settings with which the papers' numbers were produced.
ORIGINAL_DECODING = {
    "do_sample": True,
    "temperature": 0.1,
    "top_p": 0.95,
    "top_k": 500,
    "repetition_penalty": 1.1,
    "max_new_tokens": 400,
}
# A token of tokenizers that spell rare characters in bytes.
BYTE = re.compile("<0x[0-9A-F]{2}>")
GREEDY_DECODING = {"do_sample": False, "max_new_tokens": 400}


class DecodingSettings(BaseModel):
    """The settings of generation, with the values that are possible.

    `GenerationConfig.validate` of transformers checks `max_new_tokens` only; it accepts, for
    example, a negative temperature, top_p 1.5, top_k True and zero beams.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    do_sample: bool = Field(False, description="true or false")
    temperature: float = Field(
        1.0, gt=0, le=100, description="above 0, at most 100 (do_sample=False is greedy)"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="above 0, at most 1")
    top_k: int = Field(0, ge=0, description="a whole number from 0 (0: no limit)")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="above 0, at most 100")
    max_new_tokens: int = Field(400, ge=1, description="a whole number from 1")
    min_new_tokens: int = Field(0, ge=0, description="a whole number from 0")
    num_beams: int = Field(1, ge=1, le=64, description="a whole number from 1 to 64")
    length_penalty: float = Field(1.0, gt=-100, lt=100, description="above -100, below 100")


def check_decoding(decoding: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that will be used: greedy ones, changed by those given.

    Raises:
        ValueError: a setting is unknown, or its value impossible.
    """
    known = DecodingSettings.model_fields
    try:
        given = DecodingSettings.model_validate(decoding).model_dump(exclude_unset=True)
    except ValidationError as error:
        details = error.errors()[0]
        name = details["loc"][0]
        if name not in known:
            message = f"Unknown decoding setting {name!r}; there are {', '.join(known)}."
        else:
            message = f"{name} is {details['input']!r}; possible: {known[name].description}."
        raise ValueError(message) from error
    settings = GREEDY_DECODING | given
    if settings["do_sample"] and settings.get("num_beams", 1) > 1:
        raise ValueError("Beams are searched, not sampled: leave num_beams or do_sample out.")
    return settings


class RowSampler(LogitsProcessor):
    """Samples within greedy decoding: all tokens but the sampled one become impossible.

    Args:
        seeds: one for each row, any text.
        settings: for each row `temperature`, `top_k` and `top_p` as in stock sampling; a setting
            that is absent is not applied. A row that does not `do_sample` stays greedy.
    """

    def __init__(self, seeds: list[str], settings: list[dict[str, Any]]):
        # Not random.Random(text): how Python turns a text into a seed may change.
        digests = [hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest() for seed in seeds]
        self.rows = [random.Random(int.from_bytes(digest, "big")) for digest in digests]
        self.alike: dict[tuple, list[int]] = {}  # temperature, top_k, top_p -> rows
        for row, own in enumerate(settings):
            key = own.get("temperature", 1.0), own.get("top_k", 0), own.get("top_p", 1.0)
            if own["do_sample"]:
                self.alike.setdefault(key, []).append(row)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for (temperature, top_k, top_p), rows in self.alike.items():
            warpers = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
            warpers += [TopKLogitsWarper(top_k)] if top_k else []
            warpers += [TopPLogitsWarper(float(top_p))] if top_p < 1 else []
            warp = LogitsProcessorList(warpers)
            warped = warp(input_ids[rows], scores[rows])  # (rows, vocabulary)
            scores[rows] = self._sample(warped, [self.rows[row] for row in rows])
        return scores

    def _sample(self, scores: Tensor, rows: list[random.Random]) -> Tensor:
        probabilities = scores.float().softmax(-1)  # (rows, vocabulary)
        thresholds = torch.tensor([[row.random()] for row in rows], device=scores.device)
        is_reached = (probabilities.cumsum(-1) > thresholds) & (probabilities > 0)
        # Rounding may leave the sum just below a threshold near 1: then take the likeliest token.
        chosen = torch.where(
            is_reached.any(-1), is_reached.int().argmax(-1), probabilities.argmax(-1)
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class Cancelling(StoppingCriteria):
    """Stops the rows of a beam search that nobody waits for.

    `is_wanted` is called with each row at each step.
    """

    def __init__(self, is_wanted: Callable[[int], bool], rows: int):
        self.is_wanted = is_wanted
        self.rows = rows
        self.cancelled: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.cancelled |= {
            row for row in range(self.rows) if row not in self.cancelled and not self.is_wanted(row)
        }
        stops = torch.tensor(
            [row in self.cancelled for row in range(self.rows)], device=input_ids.device
        )
        return stops.repeat_interleave(len(input_ids) // self.rows)


class RowLimits(StoppingCriteria):
    """Stops each row at its own number of new tokens, after a prompt of `start` tokens."""

    def __init__(self, limits: list[int], start: int):
        self.limits = torch.tensor(limits)
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        num_beams = len(input_ids) // len(self.limits)
        limits = self.limits.repeat_interleave(num_beams)  # Beams of a row have its limit.
        return (input_ids.shape[1] - self.start >= limits).to(input_ids.device)


class BatchStreamer(BaseStreamer, StoppingCriteria):
    """Streams the growing text of each row, and stops the rows that nobody waits for.

    Args:
        on_text: called with row and whole text so far; False cancels the row.
        tokenizer: of the language model.
        decode: converts tokens to text.
        ends: end tokens.
        limits: number of new tokens of each row, at most.
    """

    def __init__(
        self,
        on_text: Callable[[int, str], bool | None],
        tokenizer: Any,
        decode: Callable[[list[int]], str],
        ends: set[int],
        limits: list[int],
    ):
        self.on_text = on_text
        self.tokenizer = tokenizer
        self.decode = decode
        self.ends = ends
        self.limits = limits
        self.tokens: list[list[int]] = []
        self.shown: list[str] = []
        self.is_done: list[bool] = []
        self.cancelled: set[int] = set()

    def put(self, value: Tensor) -> None:
        """Take the prompts first, (rows, length), then one new token of each row, (rows,)."""
        if not self.tokens:
            self.tokens = [[] for _ in value]
            self.shown = [""] * len(value)
            self.is_done = [False] * len(value)
            return
        for row, token in enumerate(value.tolist()):
            if self.is_done[row]:
                continue
            self.is_done[row] = token in self.ends
            if self.is_done[row]:
                continue
            self.tokens[row].append(token)
            self.is_done[row] = len(self.tokens[row]) == self.limits[row]
            text = self.decode(self.tokens[row])
            # Text that was streamed must not change. An incomplete character decodes as U+FFFD, and
            # so do all bytes of a run with a wrong one.
            piece = self.tokenizer.convert_ids_to_tokens(token) or ""
            is_open = text.endswith("\ufffd") or BYTE.fullmatch(piece)
            if not is_open and text.startswith(self.shown[row]):
                self.shown[row] = text
            if self.on_text(row, self.shown[row]) is False:
                self.is_done[row] = True
                self.cancelled.add(row)

    def end(self) -> None:
        """Do nothing: the whole text is in the answer."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor(
            [row in self.cancelled for row in range(len(input_ids))], device=input_ids.device
        )
