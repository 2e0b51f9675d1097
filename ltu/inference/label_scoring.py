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
from ltu.models.configuration_ltu import IGNORED
from ltu.models.generation_ltu import find_cache
from ltu.models.modeling_ltu import sum_losses
from ltu.models.prompt_template import RenderedPrompt, escape_control_tokens


@dataclass
class LabelScore:
    """A candidate and the natural logarithm of its probability, a sum over `num_tokens`."""

    text: str
    log_likelihood: float
    num_tokens: int


@dataclass
class Candidate:
    """A text whose log-likelihood is to be computed.

    Attributes:
        text: the candidate.
        tokens: of prompt and text, tokenized as one string.
        start: position of the first token that is not the prompt's.
        embeds: audio embeddings in front of it, (chunks, audio tokens, hidden), or None.
        log_likelihood: the result.
    """

    text: str
    tokens: list[int]
    start: int
    embeds: Tensor | None = None
    log_likelihood: float = 0.0

    def score(self) -> LabelScore:
        """Return the result."""
        return LabelScore(self.text, self.log_likelihood, len(self.tokens) - self.start)


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
        candidates: the texts.
        with_end: count the end token too, so that "dog" and "dog bark" compete fairly.
        tokens_at_once: the number of tokens of a forward pass, which bounds the memory; the shared
            part counts for each candidate.

    Raises:
        ValueError: there are no candidates, or one has no tokens or does not fit into the language
            model.
        ltu.data.audio.AudioError: the clip cannot be decoded.
    """
    prompt, encoded = _encode_candidates(engine, request, candidates, with_end)

    # Compute the audio and the tokens that all candidates share once.
    num_shared = min(candidate.start for candidate in encoded)
    inputs = engine.pad_batch([prompt[:num_shared]], [encoded[0].embeds])
    prefix = engine.model(**inputs, use_cache=True, logits_to_keep=1)
    width = inputs["input_ids"].shape[1]
    for group in group_candidates(encoded, num_shared, width, tokens_at_once):
        rests = [candidate.tokens[num_shared:] for candidate in group]
        log_probabilities = _log_probabilities(engine, prefix, width, rests)
        for candidate, values in zip(group, log_probabilities, strict=True):
            candidate.log_likelihood = float(values[candidate.start - num_shared :].sum())
    return [candidate.score() for candidate in encoded]


@torch.no_grad()
def score_answers(
    engine: Any, requests: list[Any], answers: list[str], tokens_at_once: int = 8192
) -> list[LabelScore]:
    """Compute the log-likelihood of one answer to each request, in the order given.

    Each score equals that of `score_labels` with the answer as the only candidate, with the end
    token. Here, requests of about the same length share a forward pass.

    Args:
        engine: an `ltu.inference.engine.LtuEngine`.
        requests: clips and questions; their decoding settings are not used.
        answers: one for each request.
        tokens_at_once: the number of tokens of a forward pass, which bounds the memory.

    Raises:
        ValueError: an answer has no tokens or does not fit into the language model.
        ltu.data.audio.AudioError: a clip cannot be decoded.
    """
    encoded = []
    for request, answer in zip(requests, answers, strict=True):
        encoded += _encode_candidates(engine, request, [answer], with_end=True)[1]
    num_chunks = [0 if candidate.embeds is None else len(candidate.embeds) for candidate in encoded]
    width = max(num_chunks, default=0) * engine.model.config.num_audio_tokens
    for group in group_candidates(encoded, 0, width, tokens_at_once):
        rows = [candidate.tokens for candidate in group]
        inputs = engine.pad_batch(rows, [candidate.embeds for candidate in group])
        # The text is at the end of each row. The first of the kept positions predicts the first
        # token of the longest answer.
        num_kept = 1 + max(len(candidate.tokens) - candidate.start for candidate in group)
        labels = torch.full((len(group), num_kept), IGNORED)  # (rows, kept positions)
        for row, candidate in enumerate(group):
            answer_tokens = torch.tensor(candidate.tokens[candidate.start :])
            labels[row, -len(answer_tokens) :] = answer_tokens
        output = engine.model(**inputs, use_cache=False, logits_to_keep=num_kept)
        losses = sum_losses(output.logits[:, -num_kept:], labels)
        for candidate, loss in zip(group, losses.tolist(), strict=True):
            candidate.log_likelihood = -loss
    return [candidate.score() for candidate in encoded]


def _encode_candidates(
    engine: Any, request: Any, candidates: list[str], with_end: bool
) -> tuple[list[int], list[Candidate]]:
    """Encode a request and the candidates for its answer, with room for the longest of them.

    Returns:
        the tokens of the prompt, and the candidates.

    Raises:
        ValueError, ltu.data.audio.AudioError: as `score_labels`.
    """
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"Candidates are a list of one or more texts, not {candidates!r}.")
    clip = engine.cache.encode([request])[0]
    if isinstance(clip, AudioError):
        raise clip
    prompt, embeds, transcript = engine.encode(request, clip, 0)
    rendered = engine.render(request, transcript)
    encoded = []
    for text in candidates:
        tokens = _encode(engine.processor, rendered, text, with_end)
        # Tokens may merge where prompt and answer meet, so the common prefix can be shorter.
        start = len(os.path.commonprefix([prompt, tokens]))
        if start == len(tokens):
            raise ValueError(
                f"The candidate {text!r} has no tokens of its own; use with_end, or leave it out."
            )
        encoded.append(Candidate(text, tokens, start))

    config = engine.model.config
    length = max(len(candidate.tokens) for candidate in encoded)
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
    for candidate in encoded:
        candidate.embeds = embeds
    return prompt, encoded


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


def group_candidates(
    candidates: list[Candidate], num_shared: int, width: int, tokens_at_once: int
) -> list[list[Candidate]]:
    """Group candidates for one forward pass each; their lengths differ by a quarter at most.

    Args:
        candidates: in any order.
        num_shared: the number of tokens that all of them share, which are computed before.
        width: the number of positions of the shared part, with audio.
        tokens_at_once: the maximum number of tokens of a group.
    """
    groups: list[list[Candidate]] = []
    longest = 0  # tokens of the longest candidate of the last group
    for candidate in sorted(candidates, key=lambda candidate: -len(candidate.tokens)):
        # The last token is predicted, but is no input.
        length = len(candidate.tokens) - num_shared - 1
        is_full = not groups or (len(groups[-1]) + 1) * (width + longest) > tokens_at_once
        if is_full or length < 0.75 * longest:  # Padding costs as much as tokens.
            groups.append([])
            longest = length
        groups[-1].append(candidate)
    return groups


def _log_probabilities(
    engine: Any, prefix: Any, width: int, rests: list[list[int]]
) -> list[Tensor]:
    """Compute the log-probability of each token of `rests`, which continue a prefix.

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
