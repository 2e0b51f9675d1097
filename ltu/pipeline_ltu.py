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

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor, BatchFeature

import ltu  # noqa: F401  registers the classes that the Auto classes look up
from ltu.audio import AudioError, load_audio
from ltu.configuration_ltu import CHECKPOINT_FILES, find_checkpoint
from ltu.processing_ltu import AudioSource, Heard

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
    """A question about a clip (path, bytes of a file, or 16 kHz mono waveform), or about none.

    Without a `transcript` LTU-AS transcribes the clip; "" says that it has none. `audio_id` is the clip's name in a
    feature folder. `mode` is "joint", "audio_only" (the transcript is left out) or "asr_only" (the sound is).
    """

    question: str
    audio: AudioSource = None
    transcript: str | None = None
    audio_id: str | None = None
    mode: str = "joint"


@dataclass
class Answer:
    """What the model says, and what it heard.

    `status` is "ok", or why the clip cannot be heard ("missing", "unreadable", "too_short", "silent"); then `text` is
    empty and `error` says more. Seconds are 0 for a question without audio. `transcript` is what was in the prompt.
    """

    text: str
    status: str = "ok"
    error: str | None = None
    seconds_heard: float = 0.0
    seconds_total: float = 0.0
    new_tokens: int = 0
    transcript: str = ""


def open_model(
    folder: str | Path, dtype: Any = "auto", language_model: str | None = None, device_map: str | None = None
) -> Any:
    """The model of a checkpoint folder, of whichever kind; arguments as of `LtuForConditionalGeneration`."""
    given = {} if device_map is None else {"device_map": device_map}
    if language_model is not None:
        # Absolute, because a relative place in a config is meant from its folder.
        is_folder = Path(language_model).is_dir()
        given["language_model"] = str(Path(language_model).resolve()) if is_folder else language_model
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)


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
        model = open_model(folder, dtype, language_model)
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        processor = AutoProcessor.from_pretrained(folder)
        if hasattr(processor.feature_extractor, "device"):  # LTU-AS's is a Whisper.
            processor.feature_extractor.device = device or best
        return cls(model.to(device or best), processor)

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
        answers: list[Answer] = []
        clips: dict[Any, Heard] = {}
        for request in requests:
            answer = Answer(text="")
            if request.audio is not None:
                key = _identity(request.audio)
                try:
                    if key not in clips:
                        clips[key] = self.processor.hear(request.audio, request.audio_id)
                    clip = clips[key]
                    has_words = clip.transcript is not None or request.transcript is not None
                    if clip.waveform is None and not has_words and request.mode != "audio_only":
                        clip.waveform = load_audio(clip.source)  # The feature folder has no words of it.
                    answer.seconds_total = clip.seconds
                    if request.mode != "asr_only":  # Then the sound is left out.
                        window = self.processor.feature_extractor.window_seconds
                        answer.seconds_heard = min(answer.seconds_total, window)
                except AudioError as error:
                    answer.status, answer.error = error.reason, str(error)
            answers.append(answer)
        good = [index for index, answer in enumerate(answers) if answer.status == "ok"]
        if not good:
            return answers
        asked = [requests[index] for index in good]
        heard = [None if request.audio is None else clips[_identity(request.audio)] for request in asked]
        given = ["" if request.mode == "audio_only" else request.transcript for request in asked]
        transcripts = self.processor.complete_transcripts(heard, given)
        for index, transcript in zip(good, transcripts, strict=True):
            answers[index].transcript = transcript
        batch = self._inputs(asked, heard, transcripts)
        prompt_length = batch["input_ids"].shape[1]
        output = self.model.generate(
            **batch, **(GREEDY_DECODING | {"pad_token_id": self.processor.pad_token_id} | decoding)
        )
        for index, ids in zip(good, output[:, prompt_length:].tolist(), strict=True):
            ids = _until_end(ids, self.model.generation_config.eos_token_id)
            answers[index].text = self.processor.decode_answer(ids)
            answers[index].new_tokens = len(ids)
        return answers

    def _inputs(self, requests: list[Request], clips: list[Heard | None], transcripts: list[str]) -> BatchFeature:
        """What `generate` takes, on its device; each distinct clip once."""
        processor = self.processor
        texts = [processor.prompt(request.question, text) for request, text in zip(requests, transcripts, strict=True)]
        clips = [None if request.mode == "asr_only" else clip for request, clip in zip(requests, clips, strict=True)]
        batch = processor.lay_out([processor.encode(text) for text in texts], [clip is not None for clip in clips])
        distinct = {id(clip): clip for clip in clips if clip is not None}
        if distinct:
            place = {key: index for index, key in enumerate(distinct)}
            batch["input_features"] = processor.features_of(list(distinct.values()))
            batch["audio_index"] = torch.tensor([place[id(clip)] for clip in clips if clip is not None])
        return BatchFeature(batch).to(self.model.get_input_embeddings().weight.device)


def _identity(audio: AudioSource) -> Any:
    return str(audio) if isinstance(audio, str | Path) else audio if isinstance(audio, bytes) else id(audio)


def _until_end(ids: list[int], eos: int | list[int] | None) -> list[int]:
    """Ids before the end token: what follows it is padding of a finished row."""
    ends = set(eos if isinstance(eos, list) else [eos])
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)
