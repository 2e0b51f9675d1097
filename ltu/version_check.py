"""Warns about library versions that were not tested, and checks generation on them.

A release of transformers may rename what it hands to a model. Such a change once made every cached
step of `generate` see a single token: wrong answers, and no error. So on a version outside the range
of `requirements.txt`, a model must generate the same with and without its cache before it is used.
"""

import warnings
import weakref
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from ltu.modeling_ltu import LtuForConditionalGeneration

# The libraries that run the model.
CHECKED_LIBRARIES = ("accelerate", "peft", "torch", "transformers")

NUM_NEW_TOKENS = 4
TEXT_LENGTHS = (5, 9)  # Tokens of the two prompts. They differ, so a batch of both has padding.
# Largest difference of two logits, as a fraction of the range of logits. Rounding of fp32 gives about
# 1e-6, of bf16 and 8 bit up to 2e-2; a missing cache gives 0.3 and more.
FP32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.1

_checked_models: "weakref.WeakSet[LtuForConditionalGeneration]" = weakref.WeakSet()


def tested_ranges() -> dict[str, str]:
    """Return the tested range of each checked library, such as ">=5.17,<5.25", by its name.

    Source: `requirements.txt` of a source tree, or what the installed package says of itself.
    """
    root = Path(__file__).parents[1]
    if (root / "pyproject.toml").is_file():
        text = (root / "requirements.txt").read_text(encoding="utf-8")
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
    else:
        try:
            lines = requires("ltu") or []
        except PackageNotFoundError:
            lines = []
    requirements = [Requirement(line) for line in lines if line]
    return {
        requirement.name: str(requirement.specifier)
        for requirement in requirements
        if requirement.name in CHECKED_LIBRARIES
    }


@cache
def untested_versions() -> tuple[str, ...]:
    """Return a description of each library whose version is outside its tested range."""
    found = []
    for name, tested in tested_ranges().items():
        installed = version(name)
        # A local build such as 2.14.1+cpu counts as its release; so does a pre-release.
        release = installed.partition("+")[0]
        if not Requirement(f"{name}{tested}").specifier.contains(release, prereleases=True):
            found.append(f"{name} {installed} (tested: {tested})")
    return tuple(found)


@cache
def warn_about_untested_versions() -> None:
    """Warn, once per process, if a library is outside its tested range."""
    if untested_versions():
        warnings.warn(
            f"Not tested with {', '.join(untested_versions())}. "
            "Install the tested versions with: pip install -c constraints.txt -e .",
            stacklevel=2,
        )


def check_generation(model: "LtuForConditionalGeneration") -> None:
    """Check a model's generation, once, if a library is outside its tested range.

    Raises:
        ValueError: logits with the cache differ from those without.
    """
    if not untested_versions() or model in _checked_models:
        return
    _checked_models.add(model)  # First, because the check itself calls `generate`.
    warn_about_untested_versions()
    difference, tolerance = compare_cached_logits(model), FP32_TOLERANCE
    if {parameter.dtype for parameter in model.language_model.parameters()} != {torch.float32}:
        tolerance = LOW_PRECISION_TOLERANCE
    if not difference <= tolerance:  # Also true for NaN.
        _checked_models.discard(model)
        raise ValueError(
            f"Answers would be wrong: with its cache the model generates other logits than without "
            f"(difference {difference:.2g} of their range, at most {tolerance:g} is rounding). Not "
            f"tested with {', '.join(untested_versions())}. Install the tested versions with: "
            "pip install -c constraints.txt -e ."
        )


@torch.no_grad()
def compare_cached_logits(model: "LtuForConditionalGeneration") -> float:
    """Generate four tokens with the cache, and compute the same logits without.

    Two prompts of unequal length, the first with audio, run alone and as one padded batch. Each is
    compared with a forward pass over one row without cache and padding.

    Returns:
        The largest difference of two logits, as a fraction of the range of the logits.
    """
    embedding = model.get_input_embeddings()
    num_audio_tokens = model.config.num_audio_tokens
    # Any tokens do, but those that stand for audio are not those of the text.
    tokens = torch.arange(num_audio_tokens + sum(TEXT_LENGTHS), device=embedding.weight.device)
    tokens = (tokens * 7 + 3) % len(embedding.weight)
    audio_tokens, first_text, second_text = tokens.split([num_audio_tokens, *TEXT_LENGTHS])
    placeholders = torch.full_like(audio_tokens, model.config.audio_token_id)
    audio_embeds = embedding(audio_tokens)[None]  # (1, audio tokens, hidden)
    with_audio = torch.cat([placeholders, first_text]), audio_embeds
    without_audio = second_text, None

    differences = []
    for prompts in ([with_audio], [without_audio], [with_audio, without_audio]):
        length = max(len(ids) for ids, _ in prompts)
        input_ids = tokens.new_zeros(len(prompts), length)
        attention_mask = torch.zeros_like(input_ids)
        for row, (ids, _) in enumerate(prompts):
            input_ids[row, length - len(ids) :] = ids
            attention_mask[row, length - len(ids) :] = 1
        output = model.generate(
            input_ids,
            attention_mask,
            audio_embeds=prompts[0][1],
            max_new_tokens=NUM_NEW_TOKENS,
            min_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        cached = torch.stack(output.logits, dim=1).float()  # (rows, new tokens, vocabulary)
        for row, (ids, embeds) in enumerate(prompts):
            new_tokens = output.sequences[row, length : length + NUM_NEW_TOKENS - 1]
            sequence = torch.cat([ids, new_tokens])[None]
            logits = model(sequence, audio_embeds=embeds, use_cache=False).logits
            uncached = logits[0, -NUM_NEW_TOKENS:].float()  # (new tokens, vocabulary)
            difference = (cached[row].to(uncached.device) - uncached).abs().max()
            difference = difference / (uncached.max() - uncached.min())
            differences.append(difference)
    return float(torch.stack(differences).max())  # NaN if one of them is.
