"""Runs stock `generate` over sequences with audio placeholders.

`generate` embeds the whole prompt once, audio included, and passes it to the stock loop as
`prompt_embeds`, one per row. So the loop can repeat rows for beams and samples, and can run with or
without a cache, and needs no code for audio. The loop's own arguments are not named here, because
their names change between releases of transformers.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput

from ltu.models.version_check import check_generation


class TextRepetitionPenalty(LogitsProcessor):
    """Repetition penalty over the text tokens of a sequence, as in the original.

    The stock processor indexes the vocabulary by every token of the sequence. It fails on audio
    placeholders, and counts padding as text.

    Args:
        penalty: divides positive and multiplies negative scores of tokens that have occurred.
        is_text: (batch, prompt length) bool, False for placeholders and padding.
    """

    def __init__(self, penalty: float, is_text: Tensor):
        self.penalty = penalty
        self.is_text = is_text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        num_rows, vocab_size = scores.shape
        rows_per_prompt = input_ids.shape[0] // self.is_text.shape[0]  # Beams or samples.
        is_text = self.is_text.to(input_ids.device).repeat_interleave(rows_per_prompt, dim=0)
        generated = is_text.new_ones(input_ids.shape[0], input_ids.shape[1] - is_text.shape[1])
        is_text = torch.cat([is_text, generated], dim=1)  # (rows, length so far)
        # Mark the tokens that have occurred. An extra column takes those that are not text.
        seen = torch.zeros(num_rows, vocab_size + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, input_ids.masked_fill(~is_text, vocab_size), True)
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen[:, :-1], penalised, scores)  # (rows, vocabulary)


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
        cache. The repetition penalty counts text only.

        Args:
            input_ids: (batch, length), as in `forward`.
            attention_mask: (batch, length); all ones if absent.
            input_features, audio_embeds, audio_index: the clips, as in `forward`.
            kwargs: of the stock method. Its `inputs` is another name of `input_ids`.

        Raises:
            ValueError: the placeholders do not fit the clips, or, on a version of transformers that
                was not tested, generation is wrong (`ltu.models.version_check`).
        """
        check_generation(self)
        input_ids = kwargs.pop("inputs", input_ids)
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
            self._replace_repetition_penalty(input_ids, attention_mask, kwargs)
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

    def _replace_repetition_penalty(
        self, input_ids: Tensor, attention_mask: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Replace the stock repetition penalty in the arguments by `TextRepetitionPenalty`."""
        penalty = kwargs.pop("repetition_penalty", None)
        for config in (kwargs.get("generation_config"), self.generation_config):
            if penalty is None and config is not None:
                penalty = config.repetition_penalty
        kwargs["repetition_penalty"] = 1.0  # Switches the stock one off, also in generation_config.
        if penalty is None or penalty == 1.0:
            return
        # The mask is longer than the tokens if a cache holds earlier tokens.
        is_seen = attention_mask[:, -input_ids.shape[1] :].bool()
        is_text = is_seen & (input_ids != self.config.audio_token_id)
        processors = kwargs.get("logits_processor") or []
        kwargs["logits_processor"] = LogitsProcessorList(
            [TextRepetitionPenalty(penalty, is_text), *processors]
        )


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
