"""Checks that batched answers equal single ones, on a user's own clips, model and hardware."""

import random
import sys
from itertools import zip_longest
from typing import Any

import torch
from transformers import LogitsProcessor

from ltu.data.audio import AudioError
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Request
from ltu.inference.sampling import check_decoding

# Difference of the two highest logits below which bf16 and fp16 may round a step either way.
NEAR_TIE = 1e-2
# Adjacent numbers in bf16 are further apart than that, 0.06 for logits from 8 to 16, and the
# rounding of many layers adds up: the two highest logits of one prompt of SmolLM2 in bf16 change
# by up to three of these steps between single and batched generation.
BFLOAT16_STEPS = 4


class TopTwo(LogitsProcessor):
    """Stores the two highest scores of each step."""

    def __init__(self):
        self.values: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.values.append(scores.float().topk(2).values)
        return scores


def generate(
    engine: LtuEngine, requests: list[Request], decoding: dict[str, Any]
) -> tuple[list, list]:
    """Generate greedily for one batch.

    Returns:
        for each request its new tokens, end token included; and for each of its steps the lead of
        the token in logits, and the lead below which rounding may decide otherwise.
    """
    settings = check_decoding(decoding)
    lead = TopTwo()
    batch = engine.inputs(requests, settings["max_new_tokens"])
    room = engine.model.config.num_positions - int(batch["attention_mask"].sum(1).max())
    settings |= {
        "max_new_tokens": min(settings["max_new_tokens"], room),
        "logits_processor": [lead],
    }
    sequences = engine.model.generate(
        **batch, **settings, pad_token_id=engine.processor.pad_token_id
    )
    best = torch.stack(lead.values, 1)  # (rows, steps, 2)
    ends = engine.end_ids
    ids = sequences[:, batch["input_ids"].shape[1] :].tolist()
    lengths = [
        next((step + 1 for step, token in enumerate(row) if token in ends), len(row)) for row in ids
    ]
    near = torch.full_like(best[..., 0], NEAR_TIE)
    if engine.model.get_output_embeddings().weight.dtype == torch.bfloat16:
        step = best[..., 0].abs().log2().floor().exp2() * torch.finfo(torch.bfloat16).eps
        near = (BFLOAT16_STEPS * step).clamp(min=NEAR_TIE)
    margins = torch.stack([best[..., 0] - best[..., 1], near], -1)  # (rows, steps, 2)
    return [row[:length] for row, length in zip(ids, lengths, strict=True)], margins.tolist()


def differences(
    engine: LtuEngine, requests: list[Request], decoding: dict[str, Any]
) -> list[tuple]:
    """Compare generation one by one with all at once, and with shuffled smaller batches.

    Returns:
        for each answer that differs: a name of the batches, the number of the request, the first
            step that differs, the lead of the single answer's token there, and the lead that
            rounding may cause.
    """
    alone = [generate(engine, [request], decoding) for request in requests]
    count = len(requests)
    order = random.Random(0).sample(range(count), count)
    size = max(2, count // 3)
    parts = [order[start : start + size] for start in range(0, count, size)]
    found = []
    for name, batches in (
        (f"all {count} at once", [range(count)]),
        (f"shuffled, {size} at once", parts),
    ):
        for batch in batches:
            together, _ = generate(engine, [requests[index] for index in batch], decoding)
            for index, ids in zip(batch, together, strict=True):
                (own,), (margins,) = alone[index]
                pairs = enumerate(zip_longest(own, ids))
                step = next((step for step, (one, other) in pairs if one != other), None)
                if step is not None:
                    lead = margins[step] if step < len(own) else (float("inf"), 0.0)
                    found.append((name, index, step, *lead))
    return found


def check_batch(engine: LtuEngine, requests: list[Request], decoding: dict[str, Any]) -> int:
    """Print a line for each difference. Return 1 if one of them is more than rounding, else 0."""
    if decoding.get("do_sample") or decoding.get("num_beams", 1) > 1:
        raise ValueError(
            "--check_batch compares greedy answers: leave the flags of sampling and beams out."
        )
    clips = engine.cache.encode(requests)
    for clip in clips:
        if isinstance(clip, AudioError):
            print(f"left out: {clip}", file=sys.stderr)
    numbers = [index for index, clip in enumerate(clips) if not isinstance(clip, AudioError)]
    if len(numbers) < 2:
        raise ValueError("--check_batch needs two questions or more whose clips can be decoded.")
    dtypes = {parameter.dtype for parameter in engine.model.language_model.parameters()}
    is_exact = dtypes == {torch.float32} and engine.processor.front_end.is_exact
    found = differences(engine, [requests[index] for index in numbers], decoding)
    if is_exact:
        rule = "fp32, so every token must be equal"
    else:
        rule = (
            f"where a token leads by {NEAR_TIE} or less (bf16: {BFLOAT16_STEPS} of its steps), "
            "another may win"
        )
    print(f"{len(numbers)} questions one by one and batched: {rule}")
    print(f"{'question':>8} {'step':>5} {'lead':>9}  batches")
    failures = [is_exact or lead > near for *_, lead, near in found]
    for (name, index, step, lead, near), has_failed in zip(found, failures, strict=True):
        verdict = "DIFFERS" if has_failed else f"near tie, up to {near:.2g}"
        print(f"{numbers[index] + 1:8} {step + 1:5} {lead:9.2g}  {name}: {verdict}")
    has_failed = any(failures)
    same = f"equal single ones{', but for near ties' if found else ''}"
    print(f"batched answers {'DIFFER from single ones' if has_failed else same}")
    return int(has_failed)
