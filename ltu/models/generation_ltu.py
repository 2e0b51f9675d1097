"""Runs stock `generate` over sequences with audio placeholders.

`generate` embeds the whole prompt once, audio included, and passes it to the stock loop as
`prompt_embeds`, one per row. So the loop can repeat rows for beams and samples, and can run with or
without a cache, and needs no code for audio. The loop's own arguments are not named here, because
their names change between releases of transformers, except those that count the tokens of the
prompt and those that cannot work with audio.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Cache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.utils import ModelOutput

from ltu.models.version_check import check_generation


@dataclass(frozen=True)
class CountingProcessor:
    """A stock logits processor that counts the tokens of the prompt.

    Args:
        stock_class: its class, whose only argument is the value of the option.
        off: the value with which `generate` does not use it.
    """

    stock_class: type[LogitsProcessor]
    off: float


@dataclass(frozen=True)
class RefusedOption:
    """An option of the stock `generate` that cannot work with audio.

    Args:
        reason: why not, and what to use instead.
        off: the value with which `generate` does not use it.
        only: the value that cannot work, if other values can.
    """

    reason: str
    off: float | bool | None = None
    only: str | None = None

    def refuses(self, value: Any) -> bool:
        if self.only is not None:
            return value == self.only
        return value not in (None, self.off)


# By the name of the option.
COUNTING_PROCESSORS = {
    "repetition_penalty": CountingProcessor(RepetitionPenaltyLogitsProcessor, 1.0),
    "no_repeat_ngram_size": CountingProcessor(NoRepeatNGramLogitsProcessor, 0),
}
NO_DRAFT = "a drafting model does not get the audio, and drafts are not checked against it"
REFUSED_OPTIONS = {
    "assistant_model": RefusedOption(NO_DRAFT),
    "assistant_early_exit": RefusedOption(NO_DRAFT),
    "prompt_lookup_num_tokens": RefusedOption("a draft could copy audio placeholders"),
    "prefill_chunk_size": RefusedOption("the prompt is embedded as a whole, with its audio"),
    "use_mtp": RefusedOption(NO_DRAFT, False),
    "speculation_type": RefusedOption(NO_DRAFT),
    "encoder_repetition_penalty": RefusedOption("use repetition_penalty", 1.0),
    "encoder_no_repeat_ngram_size": RefusedOption("use no_repeat_ngram_size", 0),
    "cache_implementation": RefusedOption(
        "continuous batching gets tokens alone, without audio", only="paged"
    ),
    "token_healing": RefusedOption("the prompt would be tokenized again, without audio", False),
}


class TextProcessor(LogitsProcessor):
    """Runs a stock logits processor over the text tokens of a sequence, as in the original.

    The stock processor would count padding as text and, on some versions of transformers, fail on
    audio placeholders, which are no tokens of the vocabulary. Here it sees both as one token more,
    with a score of its own that is dropped.

    Args:
        inner: the stock processor, which relates the tokens of a sequence to their scores.
        is_text: (batch, prompt length) bool, False for placeholders and padding.
    """

    def __init__(self, inner: LogitsProcessor, is_text: Tensor):
        self.inner = inner
        self.is_text = is_text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocab_size = scores.shape[1]
        rows_per_prompt = input_ids.shape[0] // self.is_text.shape[0]  # Beams or samples.
        is_text = self.is_text.to(input_ids.device).repeat_interleave(rows_per_prompt, dim=0)
        generated = is_text.new_ones(input_ids.shape[0], input_ids.shape[1] - is_text.shape[1])
        is_text = torch.cat([is_text, generated], dim=1)  # (rows, length so far)
        tokens = input_ids.masked_fill(~is_text, vocab_size)
        with_column = F.pad(scores, (0, 1))  # (rows, vocabulary + 1)
        return self.inner(tokens, with_column)[:, :-1]  # (rows, vocabulary)


class LtuGenerationMixin(GenerationMixin):
    """Greedy decoding, beam search and sampling over sequences with audio, by the stock loop."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_embeds: Tensor | None = None,
        audio_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the stock `generate`, which takes the other arguments and returns the result.

        Each clip is encoded once, whatever the number of beams or samples, and with or without a
        cache. The repetition penalty and `no_repeat_ngram_size` count text only.

        Args:
            input_ids: (batch, length), as in `forward`.
            attention_mask: (batch, length); all ones if absent.
            input_features, audio_embeds, audio_index: the clips, as in `forward`.
            kwargs: of the stock method. Its `inputs` is another name of `input_ids`.

        Raises:
            ValueError: the placeholders do not fit the clips, an option is one of
                `REFUSED_OPTIONS`, or, on a version of transformers that was not tested, generation
                is wrong (`ltu.models.version_check`).
        """
        check_generation(self)
        input_ids = kwargs.pop("inputs", input_ids)
        self._check_options(kwargs)
        has_clips = input_features is not None or audio_embeds is not None
        if has_clips and input_ids is None:
            raise ValueError(
                "Clips need placeholders in input_ids; inputs_embeds hold the audio already."
            )
        # The clips are not needed if a cache that the caller gives holds the audio already.
        has_cache = any(isinstance(value, Cache) for value in kwargs.values())
        if has_clips and not (has_cache and not (input_ids == self.config.audio_token_id).any()):
            kwargs["prompt_embeds"] = self._embed(
                input_ids, input_features, audio_index, audio_embeds
            )
        if input_ids is not None:
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            self._replace_processors(input_ids, attention_mask, kwargs)
        return super().generate(input_ids, attention_mask=attention_mask, **kwargs)

    # With its signature, which `generate` compares with the arguments that it is given.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Run the stock method, which makes the arguments of one forward pass.

        The embeddings of the prompt belong to its own forward pass. With a cache, later steps go
        without them, so the shapes of a step do not depend on the length of the prompt.

        Args:
            input_ids: (rows, length so far), the whole sequence.
        """
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        prompt_embeds = model_inputs.get("prompt_embeds")
        has_cache = any(isinstance(value, Cache) for value in model_inputs.values())
        if has_cache and prompt_embeds is not None and input_ids.shape[1] > prompt_embeds.shape[1]:
            del model_inputs["prompt_embeds"]
        return model_inputs

    def _replace_processors(
        self, input_ids: Tensor, attention_mask: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Replace stock processors that count the tokens of the prompt by `TextProcessor`."""
        # The mask is longer than the tokens if a cache holds earlier tokens.
        is_seen = attention_mask[:, -input_ids.shape[1] :].bool()
        is_text = is_seen & (input_ids != self.config.audio_token_id)
        processors = []
        for name, counting in COUNTING_PROCESSORS.items():
            value = self._read_option(name, kwargs)
            if value not in (None, counting.off):
                # Switches the stock one off, also in generation_config.
                kwargs[name] = counting.off
                processors.append(TextProcessor(counting.stock_class(value), is_text))
        # A caller may give a stock one too.
        stock_classes = tuple(counting.stock_class for counting in COUNTING_PROCESSORS.values())
        for given in kwargs.pop("logits_processor", None) or []:
            is_stock = isinstance(given, stock_classes)
            processors.append(TextProcessor(given, is_text) if is_stock else given)
        if processors:
            kwargs["logits_processor"] = LogitsProcessorList(processors)

    def _read_option(self, name: str, kwargs: dict[str, Any]) -> Any:
        """Return an option of `generate`: of its arguments, or of the generation config."""
        value = kwargs.get(name)
        for config in (kwargs.get("generation_config"), self.generation_config):
            if value is None and config is not None:
                value = getattr(config, name, None)
        return value

    def _check_options(self, kwargs: dict[str, Any]) -> None:
        """Refuse options of the stock `generate` that cannot work with audio.

        Raises:
            ValueError: one is given; the message has the reason.
        """
        for name, refused in REFUSED_OPTIONS.items():
            value = self._read_option(name, kwargs)
            if refused.refuses(value):
                raise ValueError(f"generate does not take {name}: {refused.reason}.")


def find_cache(output: ModelOutput) -> tuple[str, Cache]:
    """Return the name and the cache itself from the output of a forward pass.

    `forward` takes the cache under the same name, which depends on the version of transformers.

    Raises:
        ValueError: the output holds no cache.
    """
    for name, value in output.items():
        if isinstance(value, Cache):
            return name, value
    raise ValueError(
        f"The output holds no cache, but {', '.join(output)}. Call the model with use_cache=True; "
        "a language model without a key-value cache cannot share a prompt."
    )
