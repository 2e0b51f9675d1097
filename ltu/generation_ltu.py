"""What stock `generate` needs to know about audio placeholders.

Notable:
- Clips go in with the first forward pass, and with every one where there is no cache.
- Rows are repeated for beams and samples, clips are not.
- The repetition penalty counts text only.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList


class TextRepetitionPenalty(LogitsProcessor):
    """Repetition penalty over the text that the model has seen, as the original's.

    The stock processor indexes the vocabulary by every id of the sequence: it dies on audio placeholders and counts
    pads as text.

    Args:
        penalty: divides positive and multiplies negative scores of ids that have occurred.
        is_text: (batch, prompt length) bool, False for placeholders and pads.
    """

    def __init__(self, penalty: float, is_text: Tensor):
        self.penalty = penalty
        self.is_text = is_text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        is_text = self.is_text.to(input_ids.device).repeat_interleave(
            input_ids.shape[0] // self.is_text.shape[0], dim=0
        )
        generated = is_text.new_ones(input_ids.shape[0], input_ids.shape[1] - is_text.shape[1])
        is_text = torch.cat([is_text, generated], dim=1)  # (rows, length so far)
        seen = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(
            1, input_ids.masked_fill(~is_text, scores.shape[1]), True
        )  # What is not text lands in the extra column.
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen[:, :-1], penalised, scores)  # (rows, vocabulary)


class LtuGenerationMixin(GenerationMixin):
    """Greedy, beams and sampling over sequences with audio, by the stock loop."""

    def _supports_logits_to_keep(self) -> bool:
        # Stock `generate` looks for the argument in `forward`, which hands it to the language model unnamed. Without
        # it the first pass makes logits of the whole prompt.
        return self.language_model._supports_logits_to_keep()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        ids = inputs.get("input_ids")
        if ids is None or not (ids == self.config.audio_token_id).any():  # The cache holds the audio already.
            for name in ("input_features", "audio_embeds", "audio_index"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple:
        """Repeat rows, not clips: a row may hold two clips, and each clip is encoded once however many beams listen to
        it."""
        name = "input_features" if kwargs.get("audio_embeds") is None else "audio_embeds"
        features, index = kwargs.pop(name, None), kwargs.pop("audio_index", None)
        runs_per_row = None
        if features is not None and input_ids is not None:
            index = torch.arange(len(features), device=input_ids.device) if index is None else index
            runs_per_row = ((input_ids == self.config.audio_token_id).sum(-1) // self.config.num_audio_tokens).tolist()
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        if runs_per_row is not None and sum(runs_per_row):
            rows = [row for row in index.split(runs_per_row) for _ in range(expand_size)]
            kwargs |= {name: features, "audio_index": torch.cat(rows)}
        elif features is not None:
            kwargs |= {name: features, "audio_index": index}
        return input_ids, kwargs

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any):
        """Stock `generate`, with a repetition penalty that counts text only. Takes `input_features`, `audio_embeds`
        and `audio_index` as `forward` does."""
        generation_config = kwargs.get("generation_config") or self.generation_config
        penalty = kwargs.pop("repetition_penalty", None) or generation_config.repetition_penalty
        if input_ids is not None:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            kwargs["repetition_penalty"] = 1.0  # The stock processor must not run, whatever generation_config says.
            if penalty is not None and penalty != 1.0:
                is_text = attention_mask.bool() & (input_ids != self.config.audio_token_id)
                own = TextRepetitionPenalty(penalty, is_text)
                kwargs["logits_processor"] = LogitsProcessorList([own, *(kwargs.get("logits_processor") or [])])
        return super().generate(input_ids, attention_mask=attention_mask, **kwargs)
