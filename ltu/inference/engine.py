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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from transformers.utils import ModelOutput

from ltu.checkpoints.open_checkpoint import open_model, widen_to_float32
from ltu.data.audio import AudioClip, AudioError
from ltu.inference.embedding_cache import EmbeddingCache
from ltu.inference.label_scoring import LabelScore, score_answers, score_labels
from ltu.inference.requests import (
    ROW_SETTINGS,
    Answer,
    IsTurnOver,
    OnAnswer,
    OnText,
    Prompt,
    Request,
    batches,
)
from ltu.inference.row_cache import join_caches, split_cache
from ltu.inference.sampling import (
    BatchStreamer,
    Cancelling,
    Pausing,
    RowLimits,
    RowSampler,
    StreamedRow,
    check_decoding,
)
from ltu.inference.static_cache import (
    CHOICES,
    COMPILING_THREAD,
    MIN_BATCHES,
    choose_length,
    count_rows,
    find_obstacle,
)
from ltu.models.device_check import (
    check_attention,
    check_compile,
    check_device,
    check_device_map,
    check_dtype,
    cpu_has_bf16,
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


class LtuEngine:
    """A model and its processor, ready to generate.

    Threads may share an engine; it computes one batch at a time.

    Args:
        model, processor: of one checkpoint folder.
        cache_mb: size of the cache of audio embeddings, at most.
        folder: that checkpoint folder, for the hash in answers.
        static_cache: "on", "off", or "auto": on CUDA, in runs of `MIN_BATCHES` or more. Beam search
            never uses it, because reordering the beams would replace its tensors at each step.
        compile_config: how transformers compiles the decoding step with a static cache; by default
            on CUDA, with its own settings.

    Attributes:
        is_concurrent: whether requests that run at the same time do not wait for each other, so
            that a request need not wait for a batch.
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
            dtype: of the language model. "auto" is that of its files; on a CPU that does not
                multiply in bf16, it is fp32 instead of bf16 and fp16 if that fits into the memory.
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
        devices = {torch.device(device).type}  # Those that will hold the language model.
        if device_map:
            devices = {weight.device.type for weight in model.language_model.parameters()}
        if dtype == "auto" and devices == {"cpu"} and not quantization and not cpu_has_bf16():
            widen_to_float32(model.language_model)
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
        on_answer: OnAnswer | None = None,
        is_turn_over: IsTurnOver | None = None,
        **decoding: Any,
    ) -> Iterator[tuple[int, Answer | Request]]:
        """Answer requests, batch by batch.

        Args:
            on_text: called with the number of a request and its text so far, which only grows;
                False cancels that request.
            on_answer: called with the number of a request and its answer as soon as that is
                complete. Without `on_text`, or with beams, that is when its batch ends.
            is_turn_over: called after each token of a batch with the number of tokens in this call;
                True pauses the requests of the batch. Needs `on_text`; requests with beams or
                `min_new_tokens` are not paused.

        Yields:
            the number of a request and its answer, when its batch ends; for a request that was
            paused, the request to give to `run` again. Its answer has the same tokens.

        Raises:
            ValueError: a decoding setting is impossible, or the prompt template cannot express a
                history; before anything is generated.
        """
        settings, seeds = self._prepare(requests, batch_size, seed, decoding)
        num_rows = self._choose_rows(len(requests), batch_size)
        for batch in batches(requests, settings, batch_size):
            if on_text is not None:
                wanted = []
                for index in batch:
                    paused = requests[index].paused
                    if on_text(index, paused.shown if paused else "") is False:
                        yield index, self._cancelled_answer(paused)
                    else:
                        wanted.append(index)
                batch = wanted
            if not batch:
                continue
            with self._generating:
                answers = self._answer(
                    [requests[index] for index in batch],
                    [settings[index] for index in batch],
                    [seeds[index] for index in batch],
                    _renumber(on_text, batch),
                    _renumber(on_answer, batch),
                    is_turn_over,
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

    def score(self, request: Request, candidates: list[str], **settings: Any) -> list[LabelScore]:
        """Compute the log-likelihood of each candidate as the answer.

        `ltu.inference.label_scoring.score_labels` describes settings and results.
        """
        with self._generating:
            return score_labels(self, request, candidates, **settings)

    def score_answers(
        self, requests: list[Request], answers: list[str], **settings: Any
    ) -> list[LabelScore]:
        """Compute the log-likelihood of one answer to each request, in batches.

        `ltu.inference.label_scoring.score_answers` describes settings and results.
        """
        with self._generating:
            return score_answers(self, requests, answers, **settings)

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
        """Make a batch `[padding][audio][text]` on the device of the language model.

        Padding is in front, not between audio and text as in training, because a sliding window of
        attention counts it: in between, it would make the window of a row smaller.

        Args:
            tokens: of the text of each row.
            embeds: audio embeddings of each row, (chunks, audio tokens, hidden), or None.
        """
        num_chunks = [0 if own is None else len(own) for own in embeds]
        padded = self.processor.pad_batch(tokens, num_chunks)  # (rows, length) each
        # Padding first; everything else keeps its order.
        order = padded["attention_mask"].argsort(dim=1, stable=True)
        batch = BatchFeature({name: value.gather(1, order) for name, value in padded.items()})
        batch = batch.to(self.model.get_input_embeddings().weight.device)
        present = [own for own in embeds if own is not None]
        if present:
            batch["audio_embeds"] = torch.cat(present)  # (runs, audio tokens, hidden)
        return batch

    def _empty_answer(self) -> Answer:
        return Answer("", model=self.kind, checkpoint=self.checkpoint)

    def _cancelled_answer(self, paused: Prompt | None) -> Answer:
        """Return the answer of a request that is cancelled before its batch."""
        if paused is None:
            answer = self._empty_answer()
            answer.finish_reason = "cancelled"
            return answer
        self._complete(paused.answer, paused.new_tokens, "cancelled")
        return paused.answer

    @torch.no_grad()
    def _answer(
        self,
        requests: list[Request],
        settings: list[dict],
        seeds: list[int],
        on_text: OnText | None,
        on_answer: OnAnswer | None,
        is_turn_over: IsTurnOver | None,
        num_rows: int | None,
    ) -> list[Answer | Request]:
        """Answer one batch, with equal settings except for `ROW_SETTINGS`.

        Args:
            num_rows: the size to which the batch is filled up for a static cache, or None.

        Returns:
            for each request its answer, or the request to continue with.
        """
        start = time.perf_counter()
        clips = iter(self.cache.encode([own for own in requests if own.paused is None]))
        prompts = []
        for index, request in enumerate(requests):
            if request.paused is None:
                prompt = self._make_prompt(request, next(clips), settings[index], seeds[index])
            else:
                prompt = request.paused
            prompt.index = index
            prompts.append(prompt)

        def deliver(prompt: Prompt) -> None:
            prompt.answer.seconds += time.perf_counter() - start
            if on_answer is not None:
                on_answer(prompt.index, prompt.answer)

        running = []
        for prompt in prompts:
            if prompt.answer.answered:
                running.append(prompt)
            else:
                deliver(prompt)
        if running:
            numbers = [prompt.index for prompt in running]
            on_own_text = _renumber(on_text, numbers)
            self._generate(running, on_own_text, deliver, is_turn_over, num_rows)

        results: list[Answer | Request] = []
        for request, prompt in zip(requests, prompts, strict=True):
            if prompt.answer.answered and prompt.answer.finish_reason is None:
                prompt.answer.seconds += time.perf_counter() - start
                results.append(replace(request, paused=prompt))
            else:
                results.append(prompt.answer)
        return results

    def _make_prompt(
        self,
        request: Request,
        clip: AudioClip | AudioError | None,
        settings: dict[str, Any],
        seed: int,
    ) -> Prompt:
        """Encode a request, and record in its answer what is used of the clip.

        The answer says so if the clip cannot be decoded or the prompt is too long.
        """
        answer = self._empty_answer()
        answer.note_clip(clip)
        if not answer.answered:
            return Prompt(answer, settings)
        max_new_tokens = settings["max_new_tokens"]
        tokens, embeds, answer.transcript = self.encode(request, clip, max_new_tokens)
        num_chunks = 0 if embeds is None else len(embeds)
        chunk_seconds = self.processor.feature_extractor.chunk_seconds
        answer.note_prompt(len(tokens), num_chunks, chunk_seconds, self.model.config)
        # Past its last position a language model fails, or generates nonsense.
        num_positions_left = self.model.config.num_positions - answer.prompt_tokens
        limit = min(max_new_tokens, num_positions_left)
        # The prompt is part of the seed, so that equal seeds sample differently for other prompts.
        return Prompt(answer, settings, f"{seed} {tokens}", tokens, embeds, limit)

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
        self,
        prompts: list[Prompt],
        on_text: OnText | None,
        deliver: Callable[[Prompt], None],
        is_turn_over: IsTurnOver | None,
        num_rows: int | None,
    ) -> None:
        """Generate for the prompts of a batch.

        Text and length of what is complete are written into its answer, which is delivered. What
        was paused has its new tokens and its cache in its prompt.
        """
        is_static = num_rows is not None and prompts[0].settings.get("num_beams", 1) == 1
        # Copies of the first prompt fill the batch up to a size that is compiled for all batches.
        # They end after one token, and nobody reads it.
        num_copies = num_rows - len(prompts) if is_static else 0
        if is_static:
            for prompt in prompts:
                prompt.cache = None  # `generate` takes none for a static one.
        batch = self._make_batch(prompts + prompts[:1] * num_copies)
        prompt_length = batch["input_ids"].shape[1]
        # How many tokens a row may generate now; a row that was paused has some already.
        limits = [prompt.max_new_tokens - len(prompt.new_tokens) for prompt in prompts]
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
                [prompt.seed for prompt in prompts],
                [prompt.settings for prompt in prompts],
                [len(prompt.new_tokens) for prompt in prompts],
            )
            arguments["logits_processor"] = LogitsProcessorList([sampler])

        # With beams the text is known at the end only; until then a request can just be cancelled.
        has_beams = arguments.get("num_beams", 1) > 1
        watcher: Cancelling | BatchStreamer | None = None
        if on_text is not None and has_beams:
            watcher = Cancelling(lambda row: on_text(row, "") is not False, len(prompts))
        elif on_text is not None:
            watcher = self._make_streamer(prompts, on_text, deliver)
            arguments["streamer"] = watcher
        if watcher is not None:
            criteria.append(watcher)
        can_pause = is_turn_over is not None and not has_beams
        if can_pause and not arguments.get("min_new_tokens"):
            criteria.append(Pausing(is_turn_over, prompt_length))

        # Sampling is a logits processor here, so the loop itself is greedy.
        arguments |= {
            "do_sample": False,
            "pad_token_id": self.processor.pad_token_id,
            "max_new_tokens": max(limits),
            "return_dict_in_generate": True,
        }
        arguments |= batch | {"stopping_criteria": criteria}
        if is_static:
            arguments |= self.cache_settings(prompt_length + max(limits))
            output = COMPILING_THREAD.submit(self.model.generate, **arguments).result()
        else:
            output = self.model.generate(**arguments)
        if isinstance(watcher, BatchStreamer):
            self._pause(prompts, watcher.rows, batch, output)
            return
        new_tokens = output.sequences[: len(prompts), prompt_length:].tolist()
        for row, (prompt, own_tokens) in enumerate(zip(prompts, new_tokens, strict=True)):
            own_tokens = own_tokens[: limits[row]]
            if watcher is not None and row in watcher.cancelled:
                finish_reason = "cancelled"
            elif self.end_ids.isdisjoint(own_tokens):
                finish_reason = "length"
            else:
                finish_reason = "stop"
            self._complete(prompt.answer, own_tokens, finish_reason)
            deliver(prompt)

    def _make_batch(self, prompts: list[Prompt]) -> dict[str, Any]:
        """Make the arguments of `generate` for prompts, of which some may have a cache."""
        if all(prompt.cache is None for prompt in prompts):
            tokens = [prompt.all_tokens for prompt in prompts]
            return dict(self.pad_batch(tokens, [prompt.embeds for prompt in prompts]))
        # `generate` takes one cache for all rows, which lacks the last token of each.
        new = [prompt for prompt in prompts if prompt.cache is None]
        if new:
            tokens = [prompt.all_tokens[:-1] for prompt in new]
            inputs = self.pad_batch(tokens, [prompt.embeds for prompt in new])
            output = self.model(**inputs, use_cache=True, logits_to_keep=1)
            rows = list(range(len(new)))
            row_caches = split_cache(output, inputs["attention_mask"], rows)
            for prompt, row_cache in zip(new, row_caches, strict=True):
                prompt.cache = row_cache
        width = 1 + max(prompt.cache.length for prompt in prompts)
        num_audio_tokens = self.model.config.num_audio_tokens
        ids = torch.full((len(prompts), width), self.processor.pad_token_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            length = prompt.cache.length + 1
            placeholders = [self.model.config.audio_token_id] * prompt.num_chunks * num_audio_tokens
            ids[row, width - length :] = torch.tensor(placeholders + prompt.all_tokens)
            mask[row, width - length :] = 1
        cache_name = prompts[0].cache.name
        cache = join_caches([prompt.cache for prompt in prompts])
        for prompt in prompts:
            prompt.cache = None  # It is in that of the batch, so it need not be in memory twice.
        device = self.model.get_input_embeddings().weight.device
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            cache_name: cache,
        }

    def _make_streamer(
        self, prompts: list[Prompt], on_text: OnText, deliver: Callable[[Prompt], None]
    ) -> BatchStreamer:
        """Make the streamer of a batch, which delivers each answer when it is complete."""
        rows = []
        for prompt in prompts:
            rows.append(StreamedRow(prompt.max_new_tokens, list(prompt.new_tokens), prompt.shown))

        def on_done(row: int) -> None:
            self._complete(prompts[row].answer, rows[row].tokens, rows[row].finish_reason)
            deliver(prompts[row])

        return BatchStreamer(on_text, self.processor.decode_answer, self.end_ids, rows, on_done)

    def _pause(
        self,
        prompts: list[Prompt],
        rows: list[StreamedRow],
        batch: dict[str, Any],
        output: ModelOutput,
    ) -> None:
        """Store in the prompts that are not complete what `generate` has added to them."""
        paused = [number for number, row in enumerate(rows) if row.finish_reason is None]
        if not paused:
            return
        # The mask covers the prompts; each row that was paused has had a token at each step since.
        # The last one has not gone through the model.
        mask = batch["attention_mask"]
        num_steps = output.sequences.shape[1] - mask.shape[1]
        mask = torch.nn.functional.pad(mask, (0, num_steps - 1), value=1)
        row_caches = split_cache(output, mask, paused)
        for place, number in enumerate(paused):
            prompts[number].new_tokens = rows[number].tokens
            prompts[number].shown = rows[number].shown
            prompts[number].cache = row_caches[place] if row_caches else None

    def _complete(self, answer: Answer, tokens: list[int], finish_reason: str) -> None:
        """Write the text of new tokens, up to the first end token, into an answer."""
        ends = [position for position, token in enumerate(tokens) if token in self.end_ids]
        if ends:
            tokens = tokens[: ends[0]]
        answer.text = self.processor.decode_answer(tokens)
        answer.new_tokens = len(tokens)
        answer.finish_reason = finish_reason


def _renumber(callback: Callable | None, numbers: list[int]) -> Callable | None:
    """Wrap `on_text` or `on_answer` for a part of the requests.

    The n-th request of the part has the number numbers[n].
    """
    if callback is None:
        return None
    return lambda index, value: callback(numbers[index], value)


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
