"""Generates answers to requests: in batches, streamed, or as scores of given answers.

Requests are batched by clip and by length, and answered in the order of the input. Generation is
batch-invariant: in fp32 a request gets the same tokens alone and in any batch. A clip is encoded
once, however many requests are about it (`ltu.inference.embedding_cache`). A clip that cannot be
decoded gives an answer with the reason; features are never made up.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoProcessor, BatchFeature, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from ltu.checkpoints.open_checkpoint import open_model
from ltu.data.audio import AudioClip, AudioError
from ltu.inference.embedding_cache import EmbeddingCache
from ltu.inference.label_scoring import score_labels
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


class LtuEngine:
    """A model and its processor, ready to generate.

    Threads may share an engine; it computes one batch at a time.

    Args:
        model, processor: of one checkpoint folder.
        cache_mb: size of the cache of audio embeddings, at most.
        folder: that checkpoint folder, for the hash in answers.
    """

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
        settings = [check_decoding(decoding | request.decoding) for request in requests]
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it is at least 1.")
        for request in requests:
            request.check()
            self.render(request, "")
        seeds = [seed if request.seed is None else request.seed for request in requests]
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
                )
            yield from zip(batch, answers, strict=True)

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
    ) -> list[Answer | Request]:
        """Answer one batch, with equal settings except for `ROW_SETTINGS`.

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
            self._generate(running, _renumber(on_text, numbers), deliver, is_turn_over)

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

    def _generate(
        self,
        prompts: list[Prompt],
        on_text: OnText | None,
        deliver: Callable[[Prompt], None],
        is_turn_over: IsTurnOver | None,
    ) -> None:
        """Generate for the prompts of a batch.

        Text and length of what is complete are written into its answer, which is delivered. What
        was paused has its new tokens and its cache in its prompt.
        """
        batch = self._make_batch(prompts)
        prompt_length = batch["input_ids"].shape[1]
        # How many tokens a row may generate now; a row that was paused has some already.
        limits = [prompt.max_new_tokens - len(prompt.new_tokens) for prompt in prompts]
        common = prompts[0].settings.items()
        arguments: dict[str, Any] = {
            name: value for name, value in common if name not in ROW_SETTINGS
        }
        criteria = StoppingCriteriaList()
        if min(limits) < max(limits):
            criteria.append(RowLimits(limits, prompt_length))
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
        output = self.model.generate(**batch, stopping_criteria=criteria, **arguments)
        if isinstance(watcher, BatchStreamer):
            self._pause(prompts, watcher.rows, batch, output)
            return
        new_tokens = output.sequences[:, prompt_length:].tolist()
        for row, (prompt, own_tokens) in enumerate(zip(prompts, new_tokens, strict=True)):
            own_tokens = own_tokens[: limits[row]]
            ends = [place for place, token in enumerate(own_tokens) if token in self.end_ids]
            finish_reason = "stop" if ends else "length"
            if watcher is not None and row in watcher.cancelled:
                finish_reason = "cancelled"
            length = ends[0] if ends else len(own_tokens)
            self._complete(prompt.answer, own_tokens[:length], finish_reason)
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
        """Write the text of new tokens, which have no end token, into an answer."""
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
