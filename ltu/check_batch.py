"""Whether batched answers are those of one question at a time, on a user's own clips, model and hardware."""

import random
import sys
from itertools import zip_longest
from typing import Any

import torch

from ltu.audio import AudioError
from ltu.decoding import check_decoding
from ltu.pipeline_ltu import LtuPipeline
from ltu.request import Request

NEAR_TIE = 1e-2  # between the two highest logits: bf16 and fp16 may round such a step either way


def generate(pipeline: LtuPipeline, requests: list[Request], decoding: dict[str, Any]) -> tuple[list, list]:
    """Greedy ids of one batch, end token included, and by how much each step's token led; both a list a request."""
    batch = pipeline.inputs(requests)
    settings = {name: value for name, value in decoding.items() if name in ("max_new_tokens", "repetition_penalty")}
    settings = check_decoding(settings) | {"pad_token_id": pipeline.processor.pad_token_id, "output_scores": True}
    output = pipeline.model.generate(**batch, **settings, return_dict_in_generate=True)
    best = torch.stack([scores.float().topk(2).values for scores in output.scores], 1)  # (rows, steps, 2)
    ends = pipeline.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    ids = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
    lengths = [next((step + 1 for step, token in enumerate(row) if token in ends), len(row)) for row in ids]
    margins = (best[..., 0] - best[..., 1]).tolist()
    return [row[:length] for row, length in zip(ids, lengths, strict=True)], margins


def differences(pipeline: LtuPipeline, requests: list[Request], decoding: dict[str, Any]) -> list[tuple]:
    """Ask one by one, all at once, and shuffled in smaller batches. Where the latter two part from the first: which
    batches, number of the request, step, and by how much the single answer's token led at that step."""
    alone = [generate(pipeline, [request], decoding) for request in requests]
    count = len(requests)
    order, size = random.Random(0).sample(range(count), count), max(2, count // 3)
    parts = [order[start : start + size] for start in range(0, count, size)]
    found = []
    for name, batches in ((f"all {count} at once", [range(count)]), (f"shuffled, {size} at once", parts)):
        for batch in batches:
            together, _ = generate(pipeline, [requests[index] for index in batch], decoding)
            for index, ids in zip(batch, together, strict=True):
                (own,), (margins,) = alone[index]
                pairs = enumerate(zip_longest(own, ids))
                step = next((step for step, (one, other) in pairs if one != other), None)
                if step is not None:
                    found.append((name, index, step, margins[step] if step < len(own) else float("inf")))
    return found


def check_batch(pipeline: LtuPipeline, requests: list[Request], decoding: dict[str, Any]) -> int:
    """Print a row for each difference. Returns 1 if one of them is more than rounding, else 0."""
    heard = pipeline.cache.listen(requests)
    for clip in heard:
        if isinstance(clip, AudioError):
            print(f"left out: {clip}", file=sys.stderr)
    numbers = [index for index, clip in enumerate(heard) if not isinstance(clip, AudioError)]
    if len(numbers) < 2:
        raise ValueError("--check_batch needs two questions or more whose clips can be heard.")
    dtypes = {parameter.dtype for parameter in pipeline.model.language_model.parameters()}
    # Whisper computes in half precision on a GPU only.
    is_half_ear = pipeline.model.device.type == "cuda" and "fp16" in pipeline.processor.hears_with
    limit = 0.0 if dtypes == {torch.float32} and not is_half_ear else NEAR_TIE
    found = differences(pipeline, [requests[index] for index in numbers], decoding)
    rule = f"steps led by less than {limit} may differ" if limit else "fp32, so every token must be equal"
    print(f"{len(numbers)} questions one by one and batched: {rule}\n{'question':>8} {'step':>5} {'lead':>9}  batches")
    for name, index, step, margin in found:
        verdict = "near tie" if margin < limit else "DIFFERS"
        print(f"{numbers[index] + 1:8} {step + 1:5} {margin:9.2g}  {name}: {verdict}")
    has_failed = any(margin >= limit for *_, margin in found)
    print("batched answers DIFFER from single ones" if has_failed else "batched answers equal single ones")
    return int(has_failed)
