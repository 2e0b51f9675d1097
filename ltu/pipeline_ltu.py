"""Clips and questions -> answers, in batches.

Notable:
- Requests are batched by length and answered in input order; a batch gives each the answer that it gets alone (fp32:
  token by token).
- A clip that several requests of a batch ask about is encoded once.
- A clip that cannot be heard gives an answer that says so; features are never made up.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, BatchFeature

import ltu  # noqa: F401  registers the classes that the Auto classes look up
from ltu.audio import SAMPLING_RATE, AudioError, load_audio
from ltu.configuration_ltu import CHECKPOINT_FILES, find_checkpoint
from ltu.processing_ltu import AudioSource

# How the papers' numbers were produced.
ORIGINAL_DECODING = {
    "do_sample": True,
    "temperature": 0.1,
    "top_p": 0.95,
    "top_k": 500,
    "repetition_penalty": 1.1,
    "max_new_tokens": 400,
}
GREEDY_DECODING = {"do_sample": False, "max_new_tokens": 400}


@dataclass
class Request:
    """A question about a clip (path, bytes of a file, or 16 kHz mono waveform), or about none."""

    question: str
    audio: AudioSource = None
    transcript: str | None = None


@dataclass
class Answer:
    """What the model says, and what it heard.

    `status` is "ok", or why the clip cannot be heard ("missing", "unreadable", "too_short", "silent"); then `text` is
    empty and `error` says more. Seconds are 0 for a question without audio.
    """

    text: str
    status: str = "ok"
    error: str | None = None
    seconds_heard: float = 0.0
    seconds_total: float = 0.0
    new_tokens: int = 0


class LtuPipeline:
    """A model and its processor, ready to be asked.

    Args:
        model, processor: of one checkpoint folder.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | None = None, dtype: Any = "auto", language_model: str | None = None
    ) -> "LtuPipeline":
        """Open a checkpoint folder of LTU or LTU-AS on a GPU if there is one.

        Args:
            device: "cuda", "mps" or "cpu"; by default the best of them.
            dtype: of the language model.
            language_model: another place of the folder's language model.
        """
        folder = find_checkpoint(folder, CHECKPOINT_FILES)
        llm = {}
        if language_model is not None:  # Absolute, because a relative place in a config is meant from its folder.
            is_folder = Path(language_model).is_dir()
            llm["language_model"] = str(Path(language_model).resolve()) if is_folder else language_model
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **llm)
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return cls(model.to(device or best), AutoProcessor.from_pretrained(folder))

    def __call__(
        self, requests: list[Request], batch_size: int = 8, seed: int = 42, progress: bool = False, **decoding: Any
    ) -> list[Answer]:
        """Answer requests, in their order. `decoding` goes to `generate`; by default greedy, at most 400 tokens."""
        torch.manual_seed(seed)
        answers: list[Answer | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (requests[i].audio is None, len(requests[i].question), i))
        with tqdm(total=len(requests), desc="answering", unit="question", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                for index, answer in zip(batch, self._answer([requests[i] for i in batch], decoding), strict=True):
                    answers[index] = answer
                bar.update(len(batch))
        return answers

    def _answer(self, requests: list[Request], decoding: dict) -> list[Answer]:
        """One batch."""
        answers, waveforms, heard = [], {}, {}
        for request in requests:
            answer = Answer(text="")
            if request.audio is not None:
                key = _identity(request.audio)
                try:
                    if key not in waveforms:
                        waveforms[key] = load_audio(request.audio)
                    answer.seconds_total = len(waveforms[key]) / SAMPLING_RATE
                    answer.seconds_heard = min(answer.seconds_total, self.processor.feature_extractor.window_seconds)
                except AudioError as error:
                    answer.status, answer.error = error.reason, str(error)
            answers.append(answer)
        good = [index for index, answer in enumerate(answers) if answer.status == "ok"]
        if not good:
            return answers
        asked = [requests[index] for index in good]
        keys = [None if request.audio is None else _identity(request.audio) for request in asked]
        for key in keys:
            if key is not None:
                heard.setdefault(key, len(heard))
        batch = self._inputs(asked, keys, heard, waveforms)
        prompt_length = batch["input_ids"].shape[1]
        output = self.model.generate(
            **batch, **(GREEDY_DECODING | {"pad_token_id": self.processor.pad_token_id} | decoding)
        )
        for index, ids in zip(good, output[:, prompt_length:].tolist(), strict=True):
            ids = _until_end(ids, self.model.generation_config.eos_token_id)
            answers[index].text = self.processor.decode_answer(ids)
            answers[index].new_tokens = len(ids)
        return answers

    def _inputs(
        self, requests: list[Request], keys: list, heard: dict, waveforms: dict[Any, np.ndarray]
    ) -> BatchFeature:
        """What `generate` takes, on its device; each distinct clip once."""
        processor = self.processor
        ids = [processor.encode(processor.prompt(request.question, request.transcript)) for request in requests]
        batch = processor.lay_out(ids, [key is not None for key in keys])
        if heard:
            clips = [waveforms[key] for key in heard]
            batch["input_features"] = processor.feature_extractor(
                clips, sampling_rate=SAMPLING_RATE, return_tensors="pt"
            ).input_features
            batch["audio_index"] = torch.tensor([heard[key] for key in keys if key is not None])
        return BatchFeature(batch).to(self.model.get_input_embeddings().weight.device)


def _identity(audio: AudioSource) -> Any:
    return str(audio) if isinstance(audio, str | Path) else audio if isinstance(audio, bytes) else id(audio)


def _until_end(ids: list[int], eos: int | list[int] | None) -> list[int]:
    """Ids before the end token: what follows it is padding of a finished row."""
    ends = set(eos if isinstance(eos, list) else [eos])
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)
