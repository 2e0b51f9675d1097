"""Generates answers to requests: in batches, streamed, or as scores of given answers.

Requests are batched by clip and by length, and answered in the order of the input. Generation is
batch-invariant: in fp32 a request gets the same tokens alone and in any batch. A clip is encoded
once, however many requests are about it (`ltu.inference.embedding_cache`). A clip that cannot be
decoded gives an answer with the reason; features are never made up.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    BatchFeature,
    CompileConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from ltu.checkpoints.open_checkpoint import open_model
from ltu.data.audio import AudioClip, AudioError
from ltu.inference.embedding_cache import EmbeddingCache
from ltu.inference.label_scoring import score_labels
from ltu.inference.requests import ROW_SETTINGS, Answer, OnText, Request, batches
from ltu.inference.sampling import BatchStreamer, Cancelling, RowLimits, RowSampler, check_decoding
from ltu.inference.static_cache import (
    CHOICES,
    MIN_BATCHES,
    choose_length,
    compiling_thread,
    count_rows,
    find_obstacle,
)
from ltu.models.device_check import (
    check_attention,
    check_compile,
    check_device,
    check_device_map,
    check_dtype,
)
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights
from ltu.models.lora import can_merge_lora
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.prompt_template import RenderedPrompt
from ltu.models.version_check import check_generation

logger = logging.getLogger(__name__)

# Tokens of a batch that is generated only to compile its shapes. CUDA graphs are recorded at the
# second or third step.
WARM_UP_TOKENS = 5


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
        static_cache: "on", "off", or "auto": on CUDA, in runs of `MIN_BATCHES` or more. Beam search
            never uses it, because reordering the beams would replace its tensors at each step.
        compile_config: how transformers compiles the decoding step with a static cache; by default
            on CUDA, with its own settings.

    Attributes:
        language_model_sha256: hash of the language model that the checkpoint names, or None.

    Raises:
        ValueError: there is no such `static_cache`.
    """

    is_concurrent = False

    def __init__(
        self,
        model: LtuForConditionalGeneration,
        processor: LtuProcessor,
        cache_mb: float = 256,
        folder: str | Path | None = None,
        static_cache: str = "auto",
        compile_config: CompileConfig | None = None,
    ):
        check_choice("static_cache", static_cache)
        self.model = model.eval()
        self.processor = processor
        self.cache = EmbeddingCache(model, processor, cache_mb)
        self.folder = folder
        self.static_cache = static_cache
        self.compile_config = compile_config
        self.language_model_sha256 = model.config.language_model_sha256
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
        static_cache: str = "auto",
        merge_lora: str = "auto",
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
            static_cache: as of the class.
            merge_lora: "on": add the product of LoRA to the weights of the language model, in
                memory only; "off"; "auto": if these are fp32 and not tied. In fp32 this changes
                logits by rounding; in bf16 and fp16 it would round the product itself.

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
        check_choice("static_cache", static_cache)
        check_choice("merge_lora", merge_lora)
        if compile:
            check_compile(device)
        folder = find_checkpoint(folder, CHECKPOINT_FILES)
        if quantization and not device_map:
            device_map = {"": device}
        model = open_model(folder, dtype, language_model, device_map, quantization, attention)
        processor = AutoProcessor.from_pretrained(folder)
        processor.check_config(model.config)
        processor.front_end.to(device)
        language_model_sha256 = model.config.language_model_sha256
        if merge_lora == "on" or (merge_lora == "auto" and merges_exactly(model)):
            model.merge_lora()
        if compile:
            model.language_model.compile(dynamic=True)
        model = model if device_map else model.to(device)
        check_generation(model)
        engine = cls(model, processor, cache_mb, folder, static_cache)
        engine.language_model_sha256 = language_model_sha256
        return engine

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

    @cached_property
    def can_use_static_cache(self) -> bool:
        """Whether the model can generate with a static cache; if not, a warning says why."""
        obstacle = find_obstacle(self.model)
        if obstacle is not None:
            logger.warning("The cache is not static: %s.", obstacle)
        return obstacle is None

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
        num_rows = self._choose_rows(len(requests), batch_size)
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
                    num_rows,
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

    def _choose_rows(self, num_requests: int, batch_size: int) -> int | None:
        """Return the number of rows of the batches of a run, or None for dynamic caches."""
        if self.static_cache == "auto":
            is_long = num_requests > (MIN_BATCHES - 1) * batch_size
            is_wanted = is_long and self.model.device.type == "cuda"
        else:
            is_wanted = self.static_cache == "on" and num_requests > 0
        if not is_wanted:
            return None
        with self._generating:
            can_use_static_cache = self.can_use_static_cache
        return count_rows(min(batch_size, num_requests)) if can_use_static_cache else None

    def warm_up(self, batch_size: int, max_new_tokens: int = 400) -> None:
        """Compile decoding for batches of 1, 2, 4, ... up to `batch_size` short questions.

        This takes a minute or more on CUDA with `static_cache` "on", and nothing otherwise.
        """
        if self.static_cache != "on" or not self.can_use_static_cache:
            return
        size = 1
        while size < 2 * batch_size:
            self._warm_up_batch(size, max_new_tokens)
            size *= 2

    def _warm_up_batch(self, size: int, max_new_tokens: int) -> None:
        """Begin a batch of questions, which is cancelled after a few tokens."""
        num_texts: Counter[int] = Counter()

        def on_text(index: int, _: str) -> bool:
            num_texts[index] += 1
            return num_texts[index] <= WARM_UP_TOKENS

        requests = [Request("?")] * size
        settings = {"max_new_tokens": max_new_tokens, "min_new_tokens": WARM_UP_TOKENS}
        for _ in self.run(requests, size, on_text=on_text, **settings):
            pass

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
        num_rows: int | None,
    ) -> list[Answer]:
        """Answer one batch, with equal settings except for `ROW_SETTINGS`.

        Args:
            num_rows: the size to which the batch is filled up for a static cache, or None.
        """
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
            self._generate(prompts, _renumber(on_text, numbers), num_rows)
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

    def cache_settings(self, num_tokens: int) -> dict[str, Any]:
        """Return the arguments of `generate` for a static cache.

        Args:
            num_tokens: of the padded prompt and the longest possible answer.
        """
        # transformers keeps the length of the longest cache so far, even if one long prompt made
        # all later batches too large for the memory.
        self.model._previous_max_cache_length = 0
        settings = {"cache_implementation": "static", "max_cache_len": choose_length(num_tokens)}
        if self.compile_config is not None:
            settings["compile_config"] = self.compile_config
        return settings

    def _generate(
        self, prompts: list[Prompt], on_text: OnText | None, num_rows: int | None
    ) -> None:
        """Generate for the prompts of a batch, and write text and length into their answers."""
        is_static = num_rows is not None and prompts[0].settings.get("num_beams", 1) == 1
        # Copies of the first prompt fill the batch up to a size that is compiled for all batches.
        # They end after one token, and nobody reads it.
        num_copies = num_rows - len(prompts) if is_static else 0
        rows = prompts + prompts[:1] * num_copies
        batch = self.pad_batch([row.tokens for row in rows], [row.embeds for row in rows])
        prompt_length = batch["input_ids"].shape[1]
        limits = [prompt.max_new_tokens for prompt in prompts]
        row_limits = limits + [1] * num_copies
        common = prompts[0].settings.items()
        arguments: dict[str, Any] = {
            name: value for name, value in common if name not in ROW_SETTINGS
        }
        criteria = StoppingCriteriaList()
        if min(row_limits) < max(row_limits):
            criteria.append(RowLimits(row_limits, prompt_length))
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
        arguments |= batch | {"stopping_criteria": criteria}
        if is_static:
            arguments |= self.cache_settings(prompt_length + max(limits))
            output = compiling_thread().submit(self.model.generate, **arguments).result()
        else:
            output = self.model.generate(**arguments)
        for row, new_tokens in enumerate(output[: len(prompts), prompt_length:].tolist()):
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


def check_choice(name: str, choice: str) -> None:
    """Check a setting that is "auto", "on" or "off".

    Raises:
        ValueError: it is something else.
    """
    if choice not in CHOICES:
        raise ValueError(f"{name} is {choice!r}; there are {', '.join(CHOICES)}.")


def merges_exactly(model: LtuForConditionalGeneration) -> bool:
    """Return whether merging LoRA into the language model changes logits by fp32 rounding only."""
    dtypes = {parameter.dtype for parameter in model.language_model.parameters()}
    return dtypes == {torch.float32} and can_merge_lora(model.language_model)
