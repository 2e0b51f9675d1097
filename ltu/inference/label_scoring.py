"""Scores given answers to a question by their log-likelihood, without generating any.

Audio and question go through the model once; candidates continue copies of that cache, many at a
time. The tokens of a candidate are those of training, where prompt and answer are tokenized as one
string. Its log-likelihood sums the tokens from the first one that differs from the prompt's own,
so it does not depend on the other candidates.
"""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltu.data.audio import AudioError
from ltu.models.generation_ltu import find_cache
from ltu.models.prompt_template import RenderedPrompt, escape_control_tokens


@dataclass
class LabelScore:
    """A candidate and the natural logarithm of its probability, a sum over `num_tokens`."""

    text: str
    log_likelihood: float
    num_tokens: int


@torch.no_grad()
def score_labels(
    engine: Any,
    request: Any,
    candidates: list[str],
    with_end: bool = True,
    tokens_at_once: int = 8192,
) -> list[LabelScore]:
    """Compute the log-likelihood of each candidate as the whole answer, in the order given.

    Args:
        engine: an `ltu.inference.engine.LtuEngine`.
        request: clip and question; its decoding settings are not used.
        with_end: count the end token too, so that "dog" and "dog bark" compete fairly.
        tokens_at_once: of a forward pass, counting the shared part for each candidate; bounds the
            memory.

    Raises:
        ValueError: there are no candidates, or one has no tokens or does not fit into the language
            model.
        ltu.data.audio.AudioError: the clip cannot be decoded.
    """
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"Candidates are a list of one or more texts, not {candidates!r}.")
    clip = engine.cache.encode([request])[0]
    if isinstance(clip, AudioError):
        raise clip
    prompt, embeds, transcript = engine.encode(request, clip, 0)
    rendered = engine.render(request, transcript)
    ids = [_encode(engine.processor, rendered, text, with_end) for text in candidates]
    # Tokens may merge where prompt and answer meet, so the common prefix can be shorter.
    starts = [len(os.path.commonprefix([prompt, own])) for own in ids]
    empty = [
        text for text, own, start in zip(candidates, ids, starts, strict=True) if len(own) == start
    ]
    if empty:
        raise ValueError(
            f"The candidate {empty[0]!r} has no tokens of its own; use with_end, or leave it out."
        )
    config = engine.model.config
    length = max(len(own) for own in ids)
    if embeds is not None:
        # Use as many chunks as leave positions for every candidate.
        max_chunks = (config.num_positions - length) // config.num_audio_tokens
        embeds = embeds[: max(1, max_chunks)]
        length += len(embeds) * config.num_audio_tokens
    if length > config.num_positions:
        raise ValueError(
            f"The longest candidate takes {length} tokens, "
            f"the language model {config.num_positions}."
        )
    shared = min(starts)
    inputs = engine.pad_batch([ids[0][:shared]], [embeds])
    output = engine.model(**inputs, use_cache=True, logits_to_keep=1)
    width = inputs["input_ids"].shape[1]
    rests = [own[shared:] for own in ids]
    values: dict[int, float] = {}
    for chunk in _chunks([len(rest) - 1 for rest in rests], width, tokens_at_once):
        found = _log_probabilities(engine, output, width, [rests[index] for index in chunk])
        for index, own in zip(chunk, found, strict=True):
            values[index] = float(own[starts[index] - shared :].sum())
    counts = [len(own) - start for own, start in zip(ids, starts, strict=True)]
    return [LabelScore(text, values[index], counts[index]) for index, text in enumerate(candidates)]


def _encode(processor: Any, rendered: RenderedPrompt, candidate: str, with_end: bool) -> list[int]:
    """Tokenize prompt and candidate as `LtuProcessor.encode_example` does."""
    text = rendered.prompt + rendered.leading_space
    text += escape_control_tokens(candidate, processor.controls)
    if not with_end:
        return processor.encode(text)
    tokens = processor.encode(text + rendered.end)
    if tokens[-1] != rendered.end_id:
        tokens = [*tokens, rendered.end_id]
    return tokens


def _chunks(lengths: list[int], width: int, tokens_at_once: int) -> list[list[int]]:
    """Group candidates within the budget; their lengths differ by a quarter at most."""
    chunks: list[list[int]] = []
    longest = 0  # of the last chunk
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        is_full = not chunks or (len(chunks[-1]) + 1) * (width + longest) > tokens_at_once
        if is_full or lengths[index] < 0.75 * longest:  # Padding costs as much as tokens.
            chunks.append([])
            longest = lengths[index]
        chunks[-1].append(index)
    return chunks


def _log_probabilities(
    engine: Any, prefix: Any, width: int, rests: list[list[int]]
) -> list[Tensor]:
    """Compute the log-probability of each token of `rests`, which continue a prefix of `width`
    tokens.

    Returns:
        (tokens,) for each of the rests.
    """
    model = engine.model
    longest = max(map(len, rests)) - 1  # A last token is predicted, but predicts nothing.
    first = prefix.logits[0, -1].float().log_softmax(-1)  # (vocabulary,)
    found = [first[rest[:1]] for rest in rests]
    if longest == 0:
        return found
    ids = torch.full((len(rests), longest), engine.processor.pad_token_id)
    mask = torch.zeros(len(rests), width + longest, dtype=torch.long)
    for row, rest in enumerate(rests):
        ids[row, : len(rest) - 1] = torch.tensor(rest[:-1])
        mask[row, : width + len(rest) - 1] = 1
    cache_name, cache = find_cache(prefix)
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(len(rests))
    device = model.get_input_embeddings().weight.device
    ids, mask = ids.to(device), mask.to(device)
    logits = model(ids, mask, use_cache=True, **{cache_name: cache}).logits
    for row, rest in enumerate(rests):
        scores = logits[row, : len(rest) - 1].float()  # (tokens - 1, vocabulary)
        chosen = scores.gather(1, torch.tensor(rest[1:], device=scores.device)[:, None])[:, 0]
        found[row] = torch.cat([found[row], (chosen - scores.logsumexp(1)).to(first.device)])
    return found
