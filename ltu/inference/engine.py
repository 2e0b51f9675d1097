"""Clips and questions -> answers: in batches, streamed, scored; one encoding for many questions.

Notable:
- Requests are batched by clip and by length and answered in input order; a batch gives each the answer that it gets
  alone (fp32: token by token).
- A clip is encoded once however many questions ask about it (`ltu.inference.embedding_cache`).
- A clip that cannot be heard gives an answer that says so; features are never made up.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from ltu.inference.requests import ROW_SETTINGS, Answer, OnText, Request, batches
from ltu.inference.sampling import BatchStreamer, Cancelling, RowLimits, RowSampler, check_decoding
from ltu.models.checkpoint_folder import CHECKPOINT_FILES, find_checkpoint, sha256_of_weights
from ltu.models.prompt_template import RenderedPrompt
from ltu.models.version_check import check_generation


class LtuEngine:
    """A model and its processor, ready to be asked. Threads may share it; batches are computed one at a time.

    Args:
        model, processor: of one checkpoint folder.
        cache_mb: what is kept of clips for further questions, at most.
        folder: that checkpoint folder, for the hash in answers.
    """

    def __init__(
        self, model: Any, processor: Any, cache_mb: float = 256, folder: str | Path | None = None
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
        dtype: Any = "auto",
        language_model: str | None = None,
        device_map: Any = None,
        quantization: str | None = None,
        attention: str | None = None,
        compile: bool = False,
        cache_mb: float = 256,
    ) -> "LtuEngine":
        """Open a checkpoint folder of LTU or LTU-AS on a GPU if there is one.

        Args:
            device: "cuda", "mps" or "cpu"; by default the best of them.
            dtype: of the language model.
            language_model: another place of the folder's language model.
            device_map: spreads the language model over GPUs ("auto"); then `device` is Whisper's only.
            quantization: "8bit" or "4bit" weights of the language model, by bitsandbytes.
            attention: "sdpa", "flash_attention_2" or "eager", of the language model.
            compile: run the language model through torch.compile.

        Raises:
            ValueError: a setting is impossible, or a library is of a version that was not tested and
                generation is wrong on it.
        """
        folder = find_checkpoint(folder, CHECKPOINT_FILES)
        best = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        device = device or best
        device_map = {"": device} if quantization and not device_map else device_map
        model = open_model(folder, dtype, language_model, device_map, quantization, attention)
        processor = AutoProcessor.from_pretrained(folder)
        if hasattr(processor.feature_extractor, "device"):  # LTU-AS's is a Whisper.
            processor.feature_extractor.device = device
        if compile:
            model.language_model.compile(dynamic=True)
        model = model if device_map else model.to(device)
        check_generation(model)
        return cls(model, processor, cache_mb, folder)

    @property
    def kind(self) -> str:
        """ "ltu" or "ltu_as" """
        return self.model.config.model_type

    @property
    def end_ids(self) -> set[int]:
        """Tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])

    @cached_property
    def checkpoint(self) -> str:
        """sha256 of the folder's weights; "" for a model that came from none."""
        return sha256_of_weights(self.folder) if self.folder else ""

    def clip_hash(self, request: Request) -> str | None:
        """sha256 of a clip's content; None without a clip, or where it cannot be read."""
        return self.cache.hash_of(request)

    def __call__(
        self,
        requests: list[Request],
        batch_size: int = 8,
        seed: int = 42,
        progress: bool = False,
        **decoding: Any,
    ) -> list[Answer]:
        """Answer requests, in their order. `decoding` as of `check_decoding`; by default greedy, at most 400 tokens."""
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
        """Answers with the number of their request, as batches are done.

        Args:
            on_text: called with a request's number and its text so far, which only grows; False cancels that request.

        Raises:
            ValueError: a decoding setting is impossible, or the prompt template cannot express a history; before
                anything is asked.
        """
        settings = [check_decoding(decoding | request.decoding) for request in requests]
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it is at least 1.")
        for request in requests:
            request.check()
            self.render(request, "")
        seeds = [seed if request.seed is None else request.seed for request in requests]
        for batch in batches(requests, settings, batch_size):
            for index in [
                index for index in batch if on_text is not None and on_text(index, "") is False
            ]:
                batch.remove(index)  # Nobody waits for it any more.
                yield (
                    index,
                    Answer(
                        "", model=self.kind, checkpoint=self.checkpoint, finish_reason="cancelled"
                    ),
                )
            if not batch:
                continue
            inner = (
                None
                if on_text is None
                else (lambda row, text, batch=batch: on_text(batch[row], text))
            )
            asked = [requests[index] for index in batch]
            with self._generating:
                answers = self._answer(
                    asked, [settings[i] for i in batch], [seeds[i] for i in batch], inner
                )
            yield from zip(batch, answers, strict=True)

    def stream(self, request: Request, seed: int = 42, **decoding: Any) -> Iterator[str | Answer]:
        """The text so far, whenever it has grown, at last the answer. Who stops reading cancels it.

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

        shown, pool = "", ThreadPoolExecutor(1, "stream")
        try:
            answer = pool.submit(work)
            while (text := queue.get()) is not None:
                if text != shown:
                    yield (shown := text)
            yield answer.result()  # Or what was raised there.
        finally:
            is_left.set()
            pool.shutdown(wait=False)

    def score(self, request: Request, candidates: list[str], **settings: Any) -> list[Any]:
        """Log-likelihood of each candidate as the answer; see `ltu.inference.label_scoring.score_labels`."""
        from ltu.inference.label_scoring import score_labels

        with self._generating:
            return score_labels(self, request, candidates, **settings)

    def inputs(self, requests: list[Request], new_tokens: int = 0) -> BatchFeature:
        """What `generate` takes for requests whose clips can be heard, with room for `new_tokens` behind them.

        Raises:
            ltu.data.audio.AudioError: one cannot.
        """
        clips = self.cache.encode(requests)
        if errors := [clip for clip in clips if isinstance(clip, AudioError)]:
            raise errors[0]
        rows = [
            self.encode(request, clip, new_tokens)
            for request, clip in zip(requests, clips, strict=True)
        ]
        return self.pad_batch([row[0] for row in rows], [row[1] for row in rows])

    def render(self, request: Request, transcript: str | None) -> RenderedPrompt:
        """What stands around the answer. The transcript is in the message that has the clip.

        Raises:
            ValueError: the prompt template cannot express a history.
        """
        if request.history and "chat_template" not in self.processor.prompt_template:
            name = self.processor.prompt_template.get("name")
            raise ValueError(
                f"The template {name!r} of this checkpoint knows single questions only, no history."
            )
        messages = [*request.history, {"role": "user", "content": request.question}]
        place = next(
            (i for i, message in enumerate(messages) if message.get("audio") is not None), -1
        )
        messages[place] = messages[place] | {"transcript": transcript}
        return self.processor.render(messages)

    def encode(
        self, request: Request, clip: AudioClip | None, new_tokens: int
    ) -> tuple[list[int], torch.Tensor | None, str]:
        """Ids of the text, vectors (chunks, tokens, hidden) of as much audio as leaves room, and the transcript."""
        transcript = (
            (clip and clip.transcript) or "" if request.transcript is None else request.transcript
        )
        transcript = "" if request.mode == "audio_only" else transcript
        ids = self.processor.encode(self.render(request, transcript).prompt)
        if clip is None or request.mode == "asr_only":
            return ids, None, transcript
        room = (
            self.model.config.num_positions - len(ids) - new_tokens
        ) // self.model.config.num_audio_tokens
        return ids, clip.embeds[: max(1, room)], transcript

    def pad_batch(self, ids: list[list[int]], embeds: list[torch.Tensor | None]) -> BatchFeature:
        """`[audio][pads][text]` with the clips' vectors, each clip's once, on the device of the language model."""
        batch = self.processor.pad_batch(ids, [0 if own is None else len(own) for own in embeds])
        batch = BatchFeature(batch).to(self.model.get_input_embeddings().weight.device)
        if present := [own for own in embeds if own is not None]:
            batch["audio_embeds"] = torch.cat(present)  # (runs, tokens, hidden)
        return batch

    @torch.no_grad()
    def _answer(
        self,
        requests: list[Request],
        settings: list[dict],
        seeds: list[int],
        on_text: OnText | None,
    ) -> list[Answer]:
        """One batch, with equal settings but for `ROW_SETTINGS`."""
        start = time.perf_counter()
        clips = self.cache.encode(requests)
        answers = [Answer("", model=self.kind, checkpoint=self.checkpoint) for _ in requests]
        good, ids, embeds = [], [], []
        window = self.processor.feature_extractor.chunk_seconds
        for index, (answer, request, clip) in enumerate(zip(answers, requests, clips, strict=True)):
            answer.note_clip(clip)
            if answer.answered:
                text, own, answer.transcript = self.encode(
                    request, clip, settings[index]["max_new_tokens"]
                )
                answer.note_prompt(
                    len(text), 0 if own is None else len(own), window, self.model.config
                )
            if answer.answered:
                good.append(index)
                ids.append(text)
                embeds.append(own)
        if good:
            own_seeds = [f"{seeds[index]} {row}" for index, row in zip(good, ids, strict=True)]
            inner = None if on_text is None else (lambda row, text: on_text(good[row], text))
            # Past its last position a language model fails, or talks nonsense.
            rooms = [
                self.model.config.num_positions - answers[index].prompt_tokens for index in good
            ]
            limits = [
                min(settings[i]["max_new_tokens"], room)
                for i, room in zip(good, rooms, strict=True)
            ]
            batch, own_answers = self.pad_batch(ids, embeds), [answers[index] for index in good]
            self._generate(
                batch, [settings[i] for i in good], limits, own_seeds, own_answers, inner
            )
        for answer in answers:
            answer.seconds = time.perf_counter() - start
        return answers

    def _generate(
        self,
        batch: BatchFeature,
        settings: list[dict],
        limits: list[int],
        seeds: list[str],
        answers: list[Answer],
        on_text: OnText | None,
    ) -> None:
        """Fills in what the model says."""
        ends = self.end_ids
        start, stops, watching = batch["input_ids"].shape[1], [], None
        more: dict[str, Any] = {
            name: value for name, value in settings[0].items() if name not in ROW_SETTINGS
        }
        if min(limits) < (longest := max(limits)):
            stops.append(RowLimits(limits, start))
        if any(own["do_sample"] for own in settings):
            more["logits_processor"] = LogitsProcessorList([RowSampler(seeds, settings)])
        if on_text is not None and more.get("num_beams", 1) > 1:
            watching = Cancelling(lambda row: on_text(row, "") is not False, len(settings))
        elif on_text is not None:
            tokenizer, decode = self.processor.tokenizer, self.processor.decode_answer
            more["streamer"] = watching = BatchStreamer(on_text, tokenizer, decode, ends, limits)
        stops += [watching] if watching is not None else []
        more |= {
            "do_sample": False,
            "pad_token_id": self.processor.pad_token_id,
            "max_new_tokens": longest,
        }
        output = self.model.generate(**batch, stopping_criteria=StoppingCriteriaList(stops), **more)
        for row, (ids, answer) in enumerate(zip(output[:, start:].tolist(), answers, strict=True)):
            ids = ids[: limits[row]]
            length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            answer.finish_reason = "stop" if length < len(ids) else "length"
            if watching is not None and row in watching.cancelled:
                answer.finish_reason = "cancelled"
                length = len(watching.ids[row]) if isinstance(watching, BatchStreamer) else length
            answer.text = self.processor.decode_answer(ids[:length])
            answer.new_tokens = length
