"""Checks that batched answers equal single ones, on a user's own clips, model and hardware."""

import random
import sys
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import LogitsProcessor

from ltu.data.audio import AudioError
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.inference.sampling import check_decoding
from ltu.inference.static_cache import COMPILING_THREAD

# Difference of the two highest logits below which bf16 and fp16 may round a step either way.
NEAR_TIE = 1e-2
# Adjacent numbers in bf16 are further apart than that, 0.06 for logits from 8 to 16, and the
# rounding of many layers adds up: the two highest logits of one prompt of SmolLM2 in bf16 change
# by up to three of these steps between single and batched generation.
BFLOAT16_STEPS = 4


@dataclass
class Step:
    """A generated token.

    Attributes:
        token: the token.
        lead: its logit minus that of the second best token.
        near_tie: the lead up to which rounding may decide otherwise.
    """

    token: int
    lead: float
    near_tie: float


@dataclass
class Difference:
    """The first step at which a batched answer differs from the single one.

    Attributes:
        batches: a name of the batches.
        index: the number of the request.
        position: the number of the step.
        lead, near_tie: those of the single answer's token; a lead of infinity if it had ended.
    """

    batches: str
    index: int
    position: int
    lead: float
    near_tie: float


class TopTwo(LogitsProcessor):
    """Stores the two highest scores of each step."""

    def __init__(self):
        self.values: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.values.append(scores.float().topk(2).values)  # (rows, 2)
        return scores


def generate(
    engine: LtuEngine, requests: list[Request], decoding: dict[str, Any]
) -> list[list[Step]]:
    """Generate greedily for one batch. Return the steps of each request, end token included."""
    settings = check_decoding(decoding)
    top_two = TopTwo()
    batch = engine.inputs(requests, settings["max_new_tokens"])
    num_positions_left = engine.model.config.num_positions - int(
        batch["attention_mask"].sum(1).max()
    )
    settings["max_new_tokens"] = min(settings["max_new_tokens"], num_positions_left)
    arguments = settings | batch
    arguments["logits_processor"] = [top_two]
    arguments["pad_token_id"] = engine.processor.pad_token_id
    if engine.static_cache == "on" and engine.can_use_static_cache:
        num_tokens = batch["input_ids"].shape[1] + settings["max_new_tokens"]
        arguments |= engine.cache_settings(num_tokens)
        sequences = COMPILING_THREAD.submit(engine.model.generate, **arguments).result()
    else:
        sequences = engine.model.generate(**arguments)
    tokens = sequences[:, batch["input_ids"].shape[1] :].tolist()
    best, second = torch.stack(top_two.values, 1).unbind(-1)  # (rows, steps) each
    leads = (best - second).tolist()
    near_ties = torch.full_like(best, NEAR_TIE)
    if engine.model.get_output_embeddings().weight.dtype == torch.bfloat16:
        step = best.abs().log2().floor().exp2() * torch.finfo(torch.bfloat16).eps
        near_ties = (BFLOAT16_STEPS * step).clamp(min=NEAR_TIE)
    rows = []
    for row in zip(tokens, leads, near_ties.tolist(), strict=True):
        steps = []
        for token, lead, near_tie in zip(*row, strict=True):
            steps.append(Step(token, lead, near_tie))
            if token in engine.end_ids:
                break
        rows.append(steps)
    return rows


def find_difference(single: list[Step], batched: list[Step]) -> int | None:
    """Return the number of the first step whose tokens differ; None if all are equal."""
    for position, (one, other) in enumerate(zip_longest(single, batched)):
        if one is None or other is None or one.token != other.token:
            return position
    return None


def differences(
    engine: LtuEngine, requests: list[Request], decoding: dict[str, Any]
) -> list[Difference]:
    """Compare generation one by one with all at once, and with shuffled smaller batches."""
    alone = [generate(engine, [request], decoding)[0] for request in requests]
    count = len(requests)
    order = random.Random(0).sample(range(count), count)
    size = max(2, count // 3)
    parts = [order[start : start + size] for start in range(0, count, size)]
    batches = [(f"all {count} at once", list(range(count)))]
    batches += [(f"shuffled, {size} at once", part) for part in parts]

    found = []
    for name, batch in batches:
        together = generate(engine, [requests[index] for index in batch], decoding)
        for index, batched in zip(batch, together, strict=True):
            single = alone[index]
            position = find_difference(single, batched)
            if position is None:
                continue
            lead, near_tie = float("inf"), 0.0
            if position < len(single):
                lead, near_tie = single[position].lead, single[position].near_tie
            found.append(Difference(name, index, position, lead, near_tie))
    return found


def check_batch(engine: LtuEngine, requests: list[Request], decoding: dict[str, Any]) -> int:
    """Print a line for each difference. Return 1 if one of them is more than rounding, else 0."""
    if decoding.get("do_sample") or decoding.get("num_beams", 1) > 1:
        raise ValueError(
            "--check_batch compares greedy answers: leave the flags of sampling and beams out."
        )
    numbers = []
    for index, clip in enumerate(engine.cache.encode(requests)):
        if isinstance(clip, AudioError):
            print(f"left out: {clip}", file=sys.stderr)
        else:
            numbers.append(index)
    if len(numbers) < 2:
        raise ValueError("--check_batch needs two questions or more whose clips can be decoded.")
    dtypes = {parameter.dtype for parameter in engine.model.language_model.parameters()}
    is_exact = dtypes == {torch.float32} and engine.processor.front_end.is_exact
    found = differences(engine, [requests[index] for index in numbers], decoding)
    rule = "fp32, so every token must be equal"
    if not is_exact:
        rule = (
            f"where a token leads by {NEAR_TIE} or less (bf16: {BFLOAT16_STEPS} of its steps), "
            "another may win"
        )
    print(f"{len(numbers)} questions one by one and batched: {rule}")
    print(f"{'question':>8} {'step':>5} {'lead':>9}  batches")
    has_failed = False
    for difference in found:
        verdict = f"near tie, up to {difference.near_tie:.2g}"
        if is_exact or difference.lead > difference.near_tie:
            verdict = "DIFFERS"
            has_failed = True
        question = numbers[difference.index] + 1
        step = difference.position + 1
        print(f"{question:8} {step:5} {difference.lead:9.2g}  {difference.batches}: {verdict}")
    if has_failed:
        print("batched answers DIFFER from single ones")
    elif found:
        print("batched answers equal single ones, but for near ties")
    else:
        print("batched answers equal single ones")
    return int(has_failed)
