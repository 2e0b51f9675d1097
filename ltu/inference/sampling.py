"""Checks decoding settings, and samples, streams and limits each row of stock `generate`.

Answers are greedy by default. Sampling takes the random numbers of each row from a seed of its
own, so a sampled answer does not depend on the batch, its order, or whether a run was interrupted.
The text of each row can be streamed while it grows, and a row can be cancelled without the others.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
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
        num_sampled: for each row, how many tokens were sampled before, with their random numbers.
    """

    def __init__(
        self,
        seeds: list[str],
        settings: list[dict[str, Any]],
        num_sampled: list[int] | None = None,
    ):
        self.generators: list[random.Random] = []  # one for each row
        for seed in seeds:
            # Not random.Random(text): how Python turns a text into a seed may change.
            digest = hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()
            self.generators.append(random.Random(int.from_bytes(digest, "big")))
        for generator, count in zip(self.generators, num_sampled or [], strict=False):
            for _ in range(count):
                generator.random()
        # Rows with equal settings are sampled together: (temperature, top_k, top_p) -> rows.
        self.rows_of_settings: dict[tuple, list[int]] = {}
        for row, own in enumerate(settings):
            key = own.get("temperature", 1.0), own.get("top_k", 0), own.get("top_p", 1.0)
            if own["do_sample"]:
                self.rows_of_settings.setdefault(key, []).append(row)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for (temperature, top_k, top_p), rows in self.rows_of_settings.items():
            warp = make_warpers(temperature, top_k, top_p)
            warped = warp(input_ids[rows], scores[rows])  # (rows, vocabulary)
            thresholds = [self.generators[row].random() for row in rows]
            scores[rows] = self._sample(warped, torch.tensor(thresholds, device=scores.device))
        return scores

    def _sample(self, scores: Tensor, thresholds: Tensor) -> Tensor:
        """Sample the token at which the sum of the probabilities exceeds a row's threshold.

        Args:
            scores: (rows, vocabulary).
            thresholds: (rows,), random numbers from 0 to 1.

        Returns:
            (rows, vocabulary), 0 for the sampled token and minus infinity for the others.
        """
        probabilities = scores.float().softmax(-1)  # (rows, vocabulary)
        is_exceeded = probabilities.cumsum(-1) > thresholds[:, None]
        is_exceeded &= probabilities > 0
        first_exceeded = is_exceeded.int().argmax(-1)  # (rows,)
        # Rounding may leave the sum just below a threshold near 1: then take the likeliest token.
        likeliest = probabilities.argmax(-1)  # (rows,)
        chosen = torch.where(is_exceeded.any(-1), first_exceeded, likeliest)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def make_warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """Make the stock processors of sampling, without those that would change nothing."""
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


class Cancelling(StoppingCriteria):
    """Stops the rows of a beam search that nobody waits for.

    Args:
        is_wanted: called with each row at each step.
        num_rows: the number of prompts in the batch.
    """

    def __init__(self, is_wanted: Callable[[int], bool], num_rows: int):
        self.is_wanted = is_wanted
        self.num_rows = num_rows
        self.cancelled: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for row in range(self.num_rows):
            if row not in self.cancelled and not self.is_wanted(row):
                self.cancelled.add(row)
        num_beams = len(input_ids) // self.num_rows
        return stop_rows(self.cancelled, self.num_rows, input_ids).repeat_interleave(num_beams)


class RowLimits(StoppingCriteria):
    """Stops each row at its own number of new tokens, after a prompt of `start` tokens."""

    def __init__(self, limits: list[int], start: int):
        self.limits = torch.tensor(limits)
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        num_beams = len(input_ids) // len(self.limits)
        limits = self.limits.repeat_interleave(num_beams)  # Beams of a row have its limit.
        return (input_ids.shape[1] - self.start >= limits).to(input_ids.device)


class Pausing(StoppingCriteria):
    """Stops all rows of a batch when its turn is over.

    Args:
        is_turn_over: called with the number of tokens that each row has generated in this turn.
        start: the length of the prompts.
    """

    def __init__(self, is_turn_over: Callable[[int], bool], start: int):
        self.is_turn_over = is_turn_over
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        is_over = self.is_turn_over(input_ids.shape[1] - self.start)
        return torch.full((len(input_ids),), is_over, device=input_ids.device)


@dataclass
class StreamedRow:
    """A row of a batch whose text is streamed.

    Attributes:
        limit: the maximum number of new tokens.
        tokens: the new tokens so far, without an end token.
        shown: the text so far, as far as later tokens cannot change it.
        finish_reason: "stop", "length" or "cancelled" (nobody waits for it); None while more tokens
            follow.
    """

    limit: int
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    finish_reason: str | None = None


class BatchStreamer(BaseStreamer, StoppingCriteria):
    """Streams the growing text of each row, and stops the rows that nobody waits for.

    Args:
        on_text: called with row and whole text so far; False cancels the row.
        decode: converts tokens to text. More tokens append to the text, but may change U+FFFD at
            its end.
        ends: end tokens.
        rows: the rows, with the tokens that were generated before.
        on_done: called with a row as soon as it has a `finish_reason`.
    """

    def __init__(
        self,
        on_text: Callable[[int, str], bool | None],
        decode: Callable[[list[int]], str],
        ends: set[int],
        rows: list[StreamedRow],
        on_done: Callable[[int], None] | None = None,
    ):
        self.on_text = on_text
        self.decode = decode
        self.ends = ends
        self.rows = rows
        self.on_done = on_done
        self.cancelled: set[int] = set()
        self.has_prompts = False

    def put(self, value: Tensor) -> None:
        """Take the prompts first, (rows, length), then one new token of each row, (rows,).

        Further rows, which only fill a batch, are not streamed.
        """
        if not self.has_prompts:
            self.has_prompts = True
            return
        for index, (row, token) in enumerate(zip(self.rows, value.tolist(), strict=False)):
            if row.finish_reason is not None:
                continue
            self._append(index, row, token)
            if row.finish_reason is not None and self.on_done is not None:
                self.on_done(index)

    def _append(self, index: int, row: StreamedRow, token: int) -> None:
        """Append a token, and show the text that later tokens cannot change."""
        if token in self.ends:
            row.finish_reason = "stop"
            return
        row.tokens.append(token)
        text = self.decode(row.tokens)
        # An incomplete character decodes as U+FFFD.
        if not text.endswith("\ufffd") and text.startswith(row.shown):
            row.shown = text
        if self.on_text(index, row.shown) is False:
            row.finish_reason = "cancelled"
            self.cancelled.add(index)
        elif len(row.tokens) == row.limit:
            row.finish_reason = "length"

    def end(self) -> None:
        """Do nothing: the whole text is in the answer."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return stop_rows(self.cancelled, len(input_ids), input_ids)


def stop_rows(rows: set[int], num_rows: int, input_ids: Tensor) -> Tensor:
    """Return (num_rows,), True for the rows to stop, on the device of `input_ids`."""
    stops = torch.zeros(num_rows, dtype=torch.bool, device=input_ids.device)
    stops[list(rows)] = True
    return stops
