"""Checks generation on versions of libraries, and language models, that were not tested.

A release of transformers may rename the arguments that it passes to a model. Such a change once
left a single token to every cached step of `generate`: answers were wrong, and there was no error.
So on a version outside the range of `requirements.txt`, a model must generate the same with and
without its cache before it is used. The same holds for a language model of a type that the tests do
not cover.
"""

import re
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from transformers import GenerationConfig, PreTrainedModel

# The libraries that run the model.
CHECKED_LIBRARIES = ("accelerate", "peft", "torch", "transformers")
# Types of language models that tests/test_versions.py checks.
TESTED_LANGUAGE_MODELS = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)
INSTALL_HINT = "Install the tested versions with: pip install -c constraints.txt -e ."

NUM_NEW_TOKENS = 4
PROMPT_LENGTH = 6  # Tokens of each of the two prompts.
NUM_AUDIO = 3  # Those of them that stand for audio, in the prompt with audio.
# Largest difference of two logits, as a fraction of the range of logits. It is about 1e-6 by the
# rounding of fp32, 1e-2 by that of bf16, and 0.3 and more if the cache is lost.
FP32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.1

# Requirements of the copied code in a checkpoint folder, which belongs to no package; set by
# `ltu.models.custom_code.finish_entry`.
REQUIREMENTS: list[str] = []

_checked_models: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
_models_in_check: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
_check_lock = threading.RLock()  # Reentrant, because the check itself calls `generate`.


def tested_ranges() -> dict[str, str]:
    """Return the tested range of each checked library, such as ">=5.17,<5.25", by its name.

    Source: `requirements.txt` of the source tree, or the metadata of the installed package.
    """
    root = Path(__file__).parents[2]
    project = root / "pyproject.toml"
    if project.is_file() and re.search('^name = "ltu"$', project.read_text("utf-8"), re.MULTILINE):
        text = (root / "requirements.txt").read_text(encoding="utf-8")
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
    else:
        try:
            lines = requires("ltu") or []
        except PackageNotFoundError:
            lines = REQUIREMENTS
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
    ranges = tested_ranges()
    for name in CHECKED_LIBRARIES:
        installed = version(name)
        tested = ranges.get(name)
        release = installed.partition("+")[0]  # 2.14.1+cpu is a build of 2.14.1.
        if tested is None:
            found.append(f"{name} {installed} (tested: unknown)")
        elif not Requirement(f"{name}{tested}").specifier.contains(release, prereleases=True):
            found.append(f"{name} {installed} (tested: {tested})")
    return tuple(found)


@cache
def warn_about_untested_versions() -> None:
    """Warn, once per process, if a library is outside its tested range."""
    if untested_versions():
        warnings.warn(
            f"Not tested with {', '.join(untested_versions())}. {INSTALL_HINT}", stacklevel=2
        )


def check_generation(model: PreTrainedModel) -> None:
    """Check generation of a model once, unless all versions and its language model are tested.

    Raises:
        ValueError: logits with the cache differ from those without.
    """
    language_model = model.language_model
    model_type = language_model.config.model_type
    is_stock = type(language_model).__module__.startswith("transformers.")
    is_tested_model = is_stock and model_type in TESTED_LANGUAGE_MODELS
    if (is_tested_model and not untested_versions()) or model in _checked_models:
        return
    warn_about_untested_versions()
    with _check_lock:
        if model in _checked_models or model in _models_in_check:
            return
        _models_in_check.add(model)
        try:
            with neutral_settings(model):
                difference = compare_cached_logits(model)
        finally:
            _models_in_check.discard(model)
        tolerance = logit_tolerance(model)
        if difference <= tolerance:  # False for NaN.
            _checked_models.add(model)
            return
    if untested_versions():
        hint = f"Not tested with {', '.join(untested_versions())}. {INSTALL_HINT}"
    else:
        hint = (
            f"The language model {model_type!r} ({type(language_model).__name__}) does not work "
            f"with audio in padded batches. Tested: {', '.join(TESTED_LANGUAGE_MODELS)}."
        )
    raise ValueError(
        "Answers would be wrong: with its cache the model generates other logits than without "
        f"(difference {difference:.2g} of their range, at most {tolerance:g} is rounding). {hint}"
    )


def logit_tolerance(model: PreTrainedModel) -> float:
    """Return the largest difference of two logits, by their range, that can be rounding."""
    dtypes = {parameter.dtype for parameter in model.language_model.parameters()}
    return FP32_TOLERANCE if dtypes == {torch.float32} else LOW_PRECISION_TOLERANCE


def check_static_cache(model: PreTrainedModel) -> None:
    """Check that a model generates with a static cache what it computes without a cache.

    Raises:
        ValueError: the logits differ.
    """
    with _check_lock, neutral_settings(model):
        difference = compare_cached_logits(
            model, cache_implementation="static", disable_compile=True
        )
    tolerance = logit_tolerance(model)
    if not difference <= tolerance:  # True for NaN.
        raise ValueError(
            f"logits with it differ by {difference:.2g} of their range, at most {tolerance:g} is "
            "rounding"
        )


@contextmanager
def neutral_settings(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode and set its generation settings aside."""
    training = [module for module in model.modules() if module.training]
    generation_config = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation_config
        for module in training:
            module.training = True


@torch.no_grad()
def compare_cached_logits(model: PreTrainedModel, **settings: Any) -> float:
    """Generate four tokens with the cache, and compute the same logits without.

    A prompt with audio runs alone, and in a batch with one of text only. The processor pads such a
    batch as audio, padding, text, though both prompts have the same number of tokens here. So one
    forward pass without cache and padding serves for the comparison.

    Args:
        settings: further arguments of `generate`, such as the kind of the cache.

    Returns:
        The largest difference of two logits, as a fraction of the range of the logits.
    """
    embedding = model.get_input_embeddings()
    # Any tokens do, but those that stand for audio are not those of the text.
    tokens = torch.arange(2 * PROMPT_LENGTH, device=embedding.weight.device)
    tokens = (tokens * 7 + 3) % len(embedding.weight)
    audio, text, text_only = tokens.split([NUM_AUDIO, PROMPT_LENGTH - NUM_AUDIO, PROMPT_LENGTH])
    audio_embeds = embedding(audio)[None]  # (1, audio tokens, hidden)
    placeholders = torch.full_like(audio, model.config.audio_token_id)
    with_audio = torch.cat([placeholders, text])
    padding = torch.zeros_like(audio)
    rows = [torch.cat([placeholders, padding, text]), torch.cat([padding, text_only])]
    masks = [
        torch.cat([torch.ones_like(audio), padding, torch.ones_like(text)]),
        torch.cat([padding, torch.ones_like(text_only)]),
    ]
    alone = (with_audio[None], torch.ones_like(with_audio)[None])
    batch = (torch.stack(rows), torch.stack(masks))  # Each (2, audio tokens + prompt length).

    cached = []
    new_tokens = []
    for input_ids, attention_mask in (alone, batch):
        output = model.generate(
            input_ids,
            attention_mask,
            audio_embeds=audio_embeds,
            max_new_tokens=NUM_NEW_TOKENS,
            min_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
        cached.append(torch.stack(output.logits, dim=1).float())  # (rows, new tokens, vocabulary)
        new_tokens.append(output.sequences[:, input_ids.shape[1] : -1])

    # Alone and in the batch, the first prompt nearly always gets the same tokens. Then one row is
    # enough for both.
    prompts = torch.stack([with_audio, with_audio, text_only])
    sequences = torch.cat([prompts, torch.cat(new_tokens)], dim=1)
    sequences, index = sequences.unique(dim=0, return_inverse=True)
    num_runs = int((sequences == model.config.audio_token_id).any(dim=1).sum())
    output = model(
        sequences,
        audio_embeds=audio_embeds.expand(num_runs, -1, -1),
        use_cache=False,
    )
    uncached = output.logits[index, -NUM_NEW_TOKENS:].float()  # (3 rows, new tokens, vocabulary)
    difference = (torch.cat(cached).to(uncached.device) - uncached).abs().amax(dim=(1, 2))
    logit_range = uncached.amax(dim=(1, 2)) - uncached.amin(dim=(1, 2))
    return float((difference / logit_range).max())
