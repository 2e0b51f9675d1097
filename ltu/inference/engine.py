"""Generates answers to requests: in batches, streamed, or as scores of given answers.

Requests are batched by clip and by length, and answered in the order of the input. Generation is
batch-invariant: in fp32 a request gets the same tokens alone and in any batch. A clip is encoded
once, however many requests are about it (`ltu.inference.embedding_cache`). A clip that cannot be
decoded gives an answer with the reason; features are never made up.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoProcessor, BatchFeature, LogitsProcessorList, StoppingCriteriaList

from ltu.checkpoints.open_checkpoint import open_model
from ltu.data.audio import AudioClip, AudioError
from ltu.inference.embedding_cache import EmbeddingCache
from ltu.inference.label_scoring import score_labels
from ltu.inference.requests import ROW_SETTINGS, Answer, OnText, Request, batches
from ltu.inference.sampling import BatchStreamer, Cancelling, RowLimits, RowSampler, check_decoding
from ltu.models.device_check import (
    check_attention,
    check_compile,
    check_device,
    check_device_map,
    check_dtype,
)
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.prompt_template import RenderedPrompt
from ltu.models.version_check import check_generation


@dataclass
class Prompt:
    """A request of a batch on its way through the model."""

    index: int  # In the batch.
    answer: Answer
    settings: dict[str, Any]
    seed: str
    tokens: list[int]
    embeds: torch.Tensor | None  # (chunks, audio tokens, hidden)
    max_new_tokens: int


class LtuEngine:
    """A model and its processor, ready to generate.

    Threads may share an engine; it computes one batch at a time.

    Attributes:
        is_concurrent: whether requests that run at the same time do not wait for each other, so
            that a request need not wait for a batch.

    Args:
        model, processor: of one checkpoint folder.
        cache_mb: size of the cache of audio embeddings, at most.
        folder: that checkpoint folder, for the hash in answers.
    """

    is_concurrent = False

    def __init__(
        self,
        model: LtuForConditionalGeneration,
        processor: LtuProcessor,
        cache_mb: float = 256,
        folder: str | Path | None = None,
    ):
        self.model = model.eval()
        self.processor = processor
        self.cache = EmbeddingCache(model, processor, cache_mb)
        self.folder = folder
        self._generating = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        language_model: str | None = None,
        device_map: str | dict | None = None,
        quantization: str | None = None,
        attention: str | None = None,
        compile: bool = False,
        cache_mb: float = 256,
    ) -> "LtuEngine":
        """Open a checkpoint folder of LTU or LTU-AS on a GPU if there is one.

        Args:
            device: "cuda", "mps" or "cpu"; by default the best of them.
            dtype: of the language model.
            language_model: another folder or hub id of the same language model.
            device_map: spreads the language model over GPUs ("auto"); then `device` is Whisper's
                only.
            quantization: "8bit" or "4bit" weights of the language model, by bitsandbytes.
            attention: "sdpa", "flash_attention_2" or "eager", of the language model.
            compile: run the language model through torch.compile.

        Raises:
            ValueError: a setting is impossible, or a library is of a version that was not tested
                and generation is wrong on it.
        """
        # Check the settings before a checkpoint is downloaded and loaded.
        if device is None:
            device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        check_device(device)
        check_dtype(dtype)
        check_device_map(device_map)
        check_attention(attention)
        if compile:
            check_compile(device)
        folder = find_checkpoint(folder, CHECKPOINT_FILES)
        if quantization and not device_map:
            device_map = {"": device}
        model = open_model(folder, dtype, language_model, device_map, quantization, attention)
        processor = AutoProcessor.from_pretrained(folder)
        processor.check_config(model.config)
        processor.front_end.to(device)
        if compile:
            model.language_model.compile(dynamic=True)
        model = model if device_map else model.to(device)
        check_generation(model)
        return cls(model, processor, cache_mb, folder)

    @property
    def kind(self) -> str:
        """The model type of the config: ltu or ltu_as."""
        return self.model.config.model_type

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])

    @cached_property
    def checkpoint(self) -> str:
        """sha256 of the folder's weights; "" for a model that was not opened from a folder."""
        return sha256_of_weights(self.folder) if self.folder else ""

    @property
    def backend(self) -> list[str]:
        """What generates, if it is not the model in this process."""
        return []

    def check_supported(self, decoding: dict[str, Any]) -> None:
        """Check that this engine can generate with decoding settings of `check_decoding`.

        Raises:
            ValueError: it cannot.
        """

    def clip_hash(self, request: Request) -> str | None:
        """Return kind and sha256 of a clip's content; None without a clip that can be read."""
        return self.cache.hash_of(request)

    def __call__(
        self,
        requests: list[Request],
        batch_size: int = 8,
        seed: int = 42,
        progress: bool = False,
        **decoding: Any,
    ) -> list[Answer]:
        """Answer requests, in their order.

        Args:
            decoding: settings as of `check_decoding`; by default greedy, at most 400 tokens.
        """
        answers: list[Answer | None] = [None] * len(requests)
        with tqdm(
            total=len(requests), desc="answering", unit="question", disable=not progress
        ) as bar:
            for index, answer in self.run(requests, batch_size, seed, **decoding):
                answers[index] = answer
                bar.update()
        return answers

    def run(
        self,
        requests: list[Request],
        batch_size: int = 8,
        seed: int = 42,
        on_text: OnText | None = None,
        **decoding: Any,
    ) -> Iterator[tuple[int, Answer]]:
        """Answer requests, batch by batch.

        Args:
            on_text: called with the number of a request and its text so far, which only grows;
                False cancels that request.

        Yields:
            the number of a request and its answer.

        Raises:
            ValueError: a decoding setting is impossible, or the prompt template cannot express a
                history; before anything is generated.
        """
        settings, seeds = self._prepare(requests, batch_size, seed, decoding)
        for batch in batches(requests, settings, batch_size):
            if on_text is not None:
                cancelled = [index for index in batch if on_text(index, "") is False]
                batch = [index for index in batch if index not in cancelled]
                for index in cancelled:
                    answer = self._empty_answer()
                    answer.finish_reason = "cancelled"
                    yield index, answer
            if not batch:
                continue
            with self._generating:
                answers = self._answer(
                    [requests[index] for index in batch],
                    [settings[index] for index in batch],
                    [seeds[index] for index in batch],
                    _renumber(on_text, batch),
                )
            yield from zip(batch, answers, strict=True)

    def _prepare(
        self, requests: list[Request], batch_size: int, seed: int, decoding: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Check requests before anything is generated.

        Returns:
            the decoding settings and the seed of each request.

        Raises:
            ValueError: as of `run`.
        """
        settings = [check_decoding(decoding | request.decoding) for request in requests]
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it is at least 1.")
        for request in requests:
            request.check()
            self.render(request, "")
        for own in settings:
            self.check_supported(own)
        seeds = [seed if request.seed is None else request.seed for request in requests]
        return settings, seeds

    def stream(self, request: Request, seed: int = 42, **decoding: Any) -> Iterator[str | Answer]:
        """Yield the text so far, whenever it has grown, and at last the answer.

        A caller that stops reading cancels the request.

        Raises:
            ValueError: as of `run`.
        """
        queue: SimpleQueue[str | None] = SimpleQueue()
        is_left = threading.Event()

        def on_text(_: int, text: str) -> bool:
            queue.put(text)
            return not is_left.is_set()

        def work() -> Answer:
            try:
                return next(self.run([request], 1, seed, on_text, **decoding))[1]
            finally:
                queue.put(None)

        shown = ""
        pool = ThreadPoolExecutor(1, "stream")
        try:
            answer = pool.submit(work)
            while (text := queue.get()) is not None:
                if text != shown:
                    shown = text
                    yield text
            yield answer.result()  # Or what was raised there.
        finally:
            is_left.set()
            pool.shutdown(wait=False)

    def score(self, request: Request, candidates: list[str], **settings: Any) -> list[Any]:
        """Compute the log-likelihood of each candidate as the answer.

        `ltu.inference.label_scoring.score_labels` describes settings and results.
        """
        with self._generating:
            return score_labels(self, request, candidates, **settings)

    def inputs(self, requests: list[Request], new_tokens: int = 0) -> BatchFeature:
        """Make the arguments of `generate`, with positions left for `new_tokens`.

        Raises:
            ltu.data.audio.AudioError: a clip cannot be decoded.
        """
        clips = self.cache.encode(requests)
        for clip in clips:
            if isinstance(clip, AudioError):
                raise clip
        tokens, embeds = [], []
        for request, clip in zip(requests, clips, strict=True):
            own_tokens, own_embeds, _ = self.encode(request, clip, new_tokens)
            tokens.append(own_tokens)
            embeds.append(own_embeds)
        return self.pad_batch(tokens, embeds)

    def render(self, request: Request, transcript: str | None) -> RenderedPrompt:
        """Render the prompt of a request. The transcript is in the message that has the clip.

        Raises:
            ValueError: the prompt template cannot express a history.
        """
        if request.history and "chat_template" not in self.processor.prompt_template:
            name = self.processor.prompt_template.get("name")
            raise ValueError(
                f"The template {name!r} of this checkpoint knows single questions only, no history."
            )
        messages = [*request.history, {"role": "user", "content": request.question}]
        has_audio = [message.get("audio") is not None for message in messages]
        position = has_audio.index(True) if True in has_audio else -1
        messages[position] = messages[position] | {"transcript": transcript}
        return self.processor.render(messages)

    def encode(
        self, request: Request, clip: AudioClip | None, new_tokens: int
    ) -> tuple[list[int], torch.Tensor | None, str]:
        """Tokenize the prompt of a request, and take as much of its audio as fits.

        Returns:
            the tokens of the text, the audio embeddings (chunks, audio tokens, hidden) or None,
            and the transcript in the prompt.
        """
        transcript = request.transcript
        if transcript is None:
            transcript = (clip.transcript if clip else None) or ""
        if request.mode == "audio_only":
            transcript = ""
        tokens = self.processor.encode(self.render(request, transcript).prompt)
        if clip is None or request.mode == "asr_only":
            return tokens, None, transcript
        config = self.model.config
        max_chunks = (config.num_positions - len(tokens) - new_tokens) // config.num_audio_tokens
        return tokens, clip.embeds[: max(1, max_chunks)], transcript

    def pad_batch(self, tokens: list[list[int]], embeds: list[torch.Tensor | None]) -> BatchFeature:
        """Make a batch `[audio][padding][text]` on the device of the language model.

        Args:
            tokens: of the text of each row.
            embeds: audio embeddings of each row, (chunks, audio tokens, hidden), or None.
        """
        num_chunks = [0 if own is None else len(own) for own in embeds]
        batch = BatchFeature(self.processor.pad_batch(tokens, num_chunks))
        batch = batch.to(self.model.get_input_embeddings().weight.device)
        present = [own for own in embeds if own is not None]
        if present:
            batch["audio_embeds"] = torch.cat(present)  # (runs, audio tokens, hidden)
        return batch

    def _empty_answer(self) -> Answer:
        return Answer("", model=self.kind, checkpoint=self.checkpoint)

    @torch.no_grad()
    def _answer(
        self,
        requests: list[Request],
        settings: list[dict],
        seeds: list[int],
        on_text: OnText | None,
    ) -> list[Answer]:
        """Answer one batch, with equal settings except for `ROW_SETTINGS`."""
        start = time.perf_counter()
        clips = self.cache.encode(requests)
        answers = [self._empty_answer() for _ in requests]
        prompts = []
        for index, (request, clip) in enumerate(zip(requests, clips, strict=True)):
            answer = answers[index]
            answer.note_clip(clip)
            if answer.answered:
                prompt = self._make_prompt(
                    index, request, clip, settings[index], seeds[index], answer
                )
                if answer.answered:
                    prompts.append(prompt)
        if prompts:
            numbers = [prompt.index for prompt in prompts]
            self._generate(prompts, _renumber(on_text, numbers))
        for answer in answers:
            answer.seconds = time.perf_counter() - start
        return answers

    def _make_prompt(
        self,
        index: int,
        request: Request,
        clip: AudioClip | None,
        settings: dict[str, Any],
        seed: int,
        answer: Answer,
    ) -> Prompt:
        """Encode a request, and record in its answer what is used of the clip."""
        max_new_tokens = settings["max_new_tokens"]
        tokens, embeds, answer.transcript = self.encode(request, clip, max_new_tokens)
        num_chunks = 0 if embeds is None else len(embeds)
        chunk_seconds = self.processor.feature_extractor.chunk_seconds
        answer.note_prompt(len(tokens), num_chunks, chunk_seconds, self.model.config)
        # Past its last position a language model fails, or generates nonsense.
        num_positions_left = self.model.config.num_positions - answer.prompt_tokens
        limit = min(max_new_tokens, num_positions_left)
        # The prompt is part of the seed, so that equal seeds sample differently for other prompts.
        return Prompt(index, answer, settings, f"{seed} {tokens}", tokens, embeds, limit)

    def _generate(self, prompts: list[Prompt], on_text: OnText | None) -> None:
        """Generate for the prompts of a batch, and write text and length into their answers."""
        batch = self.pad_batch(
            [prompt.tokens for prompt in prompts], [prompt.embeds for prompt in prompts]
        )
        prompt_length = batch["input_ids"].shape[1]
        limits = [prompt.max_new_tokens for prompt in prompts]
        common = prompts[0].settings.items()
        arguments: dict[str, Any] = {
            name: value for name, value in common if name not in ROW_SETTINGS
        }
        criteria = StoppingCriteriaList()
        if min(limits) < max(limits):
            criteria.append(RowLimits(limits, prompt_length))
        if any(prompt.settings["do_sample"] for prompt in prompts):
            sampler = RowSampler(
                [prompt.seed for prompt in prompts], [prompt.settings for prompt in prompts]
            )
            arguments["logits_processor"] = LogitsProcessorList([sampler])

        # With beams the text is known at the end only; until then a request can just be cancelled.
        watcher: Cancelling | BatchStreamer | None = None
        if on_text is not None and arguments.get("num_beams", 1) > 1:
            watcher = Cancelling(lambda row: on_text(row, "") is not False, len(prompts))
        elif on_text is not None:
            watcher = BatchStreamer(on_text, self.processor.decode_answer, self.end_ids, limits)
            arguments["streamer"] = watcher
        if watcher is not None:
            criteria.append(watcher)

        # Sampling is a logits processor here, so the loop itself is greedy.
        arguments |= {
            "do_sample": False,
            "pad_token_id": self.processor.pad_token_id,
            "max_new_tokens": max(limits),
        }
        output = self.model.generate(**batch, stopping_criteria=criteria, **arguments)
        for row, new_tokens in enumerate(output[:, prompt_length:].tolist()):
            self._read_answer(row, new_tokens[: limits[row]], prompts[row].answer, watcher)

    def _read_answer(
        self,
        row: int,
        tokens: list[int],
        answer: Answer,
        watcher: Cancelling | BatchStreamer | None,
    ) -> None:
        """Write the text of new tokens, up to the first end token, into an answer."""
        ends = [position for position, token in enumerate(tokens) if token in self.end_ids]
        length = ends[0] if ends else len(tokens)
        answer.finish_reason = "stop" if ends else "length"
        if watcher is not None and row in watcher.cancelled:
            answer.finish_reason = "cancelled"
            if isinstance(watcher, BatchStreamer):
                length = len(watcher.tokens[row])
        answer.text = self.processor.decode_answer(tokens[:length])
        answer.new_tokens = length


def _renumber(on_text: OnText | None, numbers: list[int]) -> OnText | None:
    """Wrap `on_text` for a part of the requests; the n-th of the part has the number numbers[n]."""
    if on_text is None:
        return None
    return lambda index, text: on_text(numbers[index], text)
