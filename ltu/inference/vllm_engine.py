"""Answers requests with a vLLM server that runs the language model.

This process decodes and encodes the clips and embeds the prompts, audio and text. The server has
the merged language model (`ltu.convert_checkpoint --merged_llm_dir`) and generates; it batches the
requests that reach it by itself. So each request is sent as soon as its prompt is ready.

Greedy answers are those of `LtuEngine` up to the rounding of another implementation. Sampled ones
have the same distribution but other random numbers. What cannot be the same is refused: beams,
which are no streamed completion, and the repetition penalty, because a server that is given
embeddings does not know the tokens of the prompt, over which the penalty is defined.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from ltu.checkpoints.open_prompt_encoder import open_prompt_encoder
from ltu.checkpoints.save_checkpoint import served_name
from ltu.inference.engine import LtuEngine
from ltu.inference.requests import (
    BUSY,
    FAILED,
    Answer,
    IsTurnOver,
    OnAnswer,
    OnText,
    Prompt,
    Request,
    batches,
)
from ltu.inference.sampling import BatchStreamer, StreamedRow
from ltu.inference.vllm_client import (
    ServerFailure,
    VllmHost,
    VllmHosts,
    encode_embeds,
    quote,
)
from ltu.models.device_check import check_device, check_dtype
from ltu.models.locate_checkpoint import CHECKPOINT_FILES, find_checkpoint
from ltu.models.modeling_ltu import LtuForConditionalGeneration
from ltu.models.processing_ltu import LtuProcessor
from ltu.models.provenance import read_record

KEY_VARIABLE = "VLLM_API_KEY"  # The environment variable of the key, as on the server.
# Questions of a dataset in a row that the servers did not answer, after which the run ends.
FAILURES_IN_ROW = 16
# Texts whose next token must be the same by their tokens and by our embeddings of them.
PROBES = ("The sound of a dog barking in", "Which sound is it? It is a", "One, two, three,")
PROBES_EQUAL = 2  # So many must be; a server that computes in bf16 may decide a tie either way.


class ReceivedAnswer:
    """The tokens of one answer while they arrive, and the text that is shown of them.

    Args:
        on_text: called with 0 and the text so far; False cancels the request.
        is_left: set when nobody waits for any answer of the run.
        engine: decodes tokens.
        limit: the maximum number of tokens.
    """

    def __init__(
        self, on_text: OnText | None, is_left: threading.Event, engine: LtuEngine, limit: int
    ):
        self.on_text = on_text
        self.is_left = is_left
        self.engine = engine
        self.limit = limit
        self.tokens: list[int] = []
        self.streamer: BatchStreamer | None = None
        self._start()

    def _start(self) -> None:
        self.tokens = []
        if self.on_text is not None:
            decode = self.engine.processor.decode_answer
            rows = [StreamedRow(self.limit)]
            self.streamer = BatchStreamer(self.on_text, decode, self.engine.end_ids, rows)
            self.streamer.put(torch.empty(0))  # In place of the prompts.

    def add(self, tokens: list[int]) -> None:
        """Take the next tokens, and show the text that later ones cannot change."""
        self.tokens += tokens
        if self.streamer is not None:
            for token in tokens:
                self.streamer.put(torch.tensor([token]))

    def is_wanted(self) -> bool:
        """Return whether somebody still waits for the answer."""
        if self.streamer is not None and not self.streamer.cancelled:
            row = self.streamer.rows[0]
            if row.finish_reason is None and self.on_text(0, row.shown) is False:
                self.streamer.cancelled.add(0)
        is_cancelled = self.streamer is not None and bool(self.streamer.cancelled)
        return not is_cancelled and not self.is_left.is_set()

    def restart(self) -> bool:
        """Forget the tokens; False if text of them was shown."""
        if self.streamer is not None and self.streamer.rows[0].shown:
            return False
        self._start()
        return True


class VllmEngine(LtuEngine):
    """The prompts of a checkpoint, and vLLM servers that generate.

    Args:
        model: of `open_prompt_encoder`.
        processor: of the same checkpoint folder.
        urls: addresses of the servers, such as http://HOST:8000/v1.
        cache_mb, folder: as of `LtuEngine`.
        connection: `connect_seconds` and `idle_seconds` of `VllmConnection`.

    Raises:
        ValueError: an address is impossible, or a server has another model or refuses requests.
        ConnectionError: no server can be reached.
    """

    is_concurrent = True

    def __init__(
        self,
        model: LtuForConditionalGeneration,
        processor: LtuProcessor,
        urls: list[str],
        cache_mb: float = 256,
        folder: str | Path | None = None,
        **connection: float,
    ):
        super().__init__(model, processor, cache_mb, folder)
        key = os.environ.get(KEY_VARIABLE, "").strip()
        self.hosts = VllmHosts(urls, self._check_host, key, **connection)
        self.hosts.check_all()
        lengths = [host.max_length for host in self.hosts.hosts if host.model]
        num_positions = min([model.config.num_positions, *lengths])
        # A server may have room for fewer tokens than its model has positions.
        model.config.text_config.max_position_embeddings = num_positions

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        urls: list[str],
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        language_model: str | None = None,
        cache_mb: float = 256,
        **connection: float,
    ) -> "VllmEngine":
        """Open what embeds the prompts of a checkpoint folder, and connect to servers.

        Args:
            folder: of the checkpoint, merged or not.
            urls, connection: as of the class.
            device, language_model, cache_mb: as of `LtuEngine.from_pretrained`.
            dtype: of the embeddings that are sent.
        """
        if device is None:
            device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        check_device(device)
        check_dtype(dtype)
        folder = find_checkpoint(folder, CHECKPOINT_FILES)
        model = open_prompt_encoder(folder, device, dtype, language_model)
        processor = AutoProcessor.from_pretrained(folder)
        processor.check_config(model.config)
        processor.front_end.to(device)
        return cls(model, processor, urls, cache_mb, folder, **connection)

    @property
    def backend(self) -> list[str]:
        """Names of the served models: answers of another one are not reused."""
        # A server that could not be reached yet has no name here.
        return ["vllm", *sorted({host.model for host in self.hosts.hosts if host.model})]

    def check_supported(self, decoding: dict[str, Any]) -> None:
        """Check that a server can generate with these settings as this project defines them.

        Raises:
            ValueError: it cannot.
        """
        check_vllm_decoding(decoding)

    def score(self, request: Request, candidates: list[str], **settings: Any) -> list[Any]:
        """Refuse: scores need the language model in this process.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Labels are scored by the language model in this process: leave --engine vllm out."
        )

    def run(
        self,
        requests: list[Request],
        batch_size: int = 8,
        seed: int = 42,
        on_text: OnText | None = None,
        on_answer: OnAnswer | None = None,
        is_turn_over: IsTurnOver | None = None,
        **decoding: Any,
    ) -> Iterator[tuple[int, Answer]]:
        """Answer requests, `batch_size` of them at the same time.

        Args:
            on_text: as of `LtuEngine.run`; it is called from several threads.
            on_answer, is_turn_over: not used, since each answer is yielded when it is complete, and
                no request waits for others.

        Yields:
            the number of a request and its answer, as soon as it is complete.

        Raises:
            ValueError: as of `LtuEngine.run`, or a setting is one that a server cannot have.
            ConnectionError: the servers did not answer `FAILURES_IN_ROW` questions in a row.
        """
        settings, seeds = self._prepare(requests, batch_size, seed, decoding)
        is_left = threading.Event()
        failures = 0
        # Requests about one clip follow each other, so that the cache has it.
        waiting = deque(chain.from_iterable(batches(requests, settings, batch_size)))
        running: dict[Future[Answer], int] = {}
        pool = ThreadPoolExecutor(batch_size, "questions")
        try:
            while waiting or running:
                while waiting and len(running) < batch_size:
                    index = waiting.popleft()
                    own = requests[index], settings[index], seeds[index]
                    watch = on_text and _for_request(on_text, index)
                    running[pool.submit(self._answer_one, *own, watch, is_left)] = index
                for index, answer in _take_finished(running):
                    failures = self._count_failures(answer, failures, on_text)
                    yield index, answer
        finally:
            is_left.set()
            pool.shutdown(cancel_futures=True)

    def _count_failures(self, answer: Answer, failures: int, on_text: OnText | None) -> int:
        """Return how many answers in a row the servers did not give.

        Raises:
            ConnectionError: too many of a dataset, where nobody watches.
        """
        if answer.status not in (BUSY, FAILED):
            return 0
        if on_text is None and failures + 1 >= FAILURES_IN_ROW:
            raise ConnectionError(
                f"The servers did not answer {FAILURES_IN_ROW} questions in a row, the last "
                f"because of {answer.error} Start them and run it again."
            )
        return failures + 1

    @torch.no_grad()
    def _answer_one(
        self,
        request: Request,
        settings: dict[str, Any],
        seed: int,
        on_text: OnText | None,
        is_left: threading.Event,
    ) -> Answer:
        """Encode a clip, embed the prompt, and let a server generate."""
        start = time.perf_counter()
        answer = self._empty_answer()
        if is_left.is_set() or (on_text is not None and on_text(0, "") is False):
            answer.finish_reason = "cancelled"
            return answer
        clip = self.cache.encode([request])[0]
        prompt = self._make_prompt(request, clip, settings, seed)
        if prompt.answer.answered:
            self._receive(prompt, on_text, is_left)
        prompt.answer.seconds = time.perf_counter() - start
        return prompt.answer

    def _receive(self, prompt: Prompt, on_text: OnText | None, is_left: threading.Event) -> None:
        """Let a server generate, and write text and length, or the failure, into the answer."""
        answer = prompt.answer
        received = ReceivedAnswer(on_text, is_left, self, prompt.max_new_tokens)
        body = self._make_body(prompt)
        try:
            finish_reason = self.hosts.complete(body, received)
        except ServerFailure as failure:
            answer.status = BUSY if failure.is_busy else FAILED
            answer.error = f"{failure}."
            return
        tokens = received.tokens
        if received.streamer is not None and received.streamer.cancelled:
            tokens = received.streamer.rows[0].tokens
            finish_reason = "cancelled"
        self._complete(answer, tokens, finish_reason)

    def _make_body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the body of a completion request, without the name of the model.

        Every setting of sampling is in it, because a server takes those that are missing from the
        `generation_config.json` of its folder.
        """
        settings = prompt.settings
        limit = prompt.max_new_tokens
        return {
            "prompt_embeds": encode_embeds(self._embed_prompt(prompt.tokens, prompt.embeds)),
            "max_tokens": limit,
            "min_tokens": min(settings.get("min_new_tokens", 0), limit),
            **sampling_fields(settings),
            "seed": make_seed(prompt.seed),
            **self._common_fields(),
        }

    def _common_fields(self) -> dict[str, Any]:
        """Return the fields that all requests share.

        An answer ends at our end tokens and at no others, which the server's own might be. Its
        text is decoded here, from `token_ids`.
        """
        return {
            "n": 1,
            "stream": True,
            "return_token_ids": True,
            "stop_token_ids": sorted(self.end_ids),
            "ignore_eos": True,
        }

    def _embed_prompt(self, tokens: list[int], embeds: torch.Tensor | None) -> torch.Tensor:
        """Return the embeddings of a prompt, (tokens, hidden): its audio, then its text.

        Args:
            tokens: of the text.
            embeds: audio embeddings, (chunks, audio tokens, hidden), or None.
        """
        table = self.model.get_input_embeddings()
        text = table(torch.tensor(tokens, device=table.weight.device))  # (text tokens, hidden)
        if embeds is None:
            return text
        audio = embeds.flatten(0, 1).to(text)  # (chunks * audio tokens, hidden)
        return torch.cat([audio, text])

    def _check_host(self, host: VllmHost) -> None:
        """Check that a server has the language model of this checkpoint.

        Its name must not be that of another checkpoint, its model's first tokens for some texts
        must be the same for our embeddings of them, and it must have room for our prompts.

        Raises:
            ValueError: it has another model.
            ServerFailure: it does not answer.
        """
        with host.lock:
            if host.model:
                return
            name, max_length = self._find_model(host)
            self._check_name(host, name)
            is_too_short = any(max_length < other.max_length for other in self.hosts.hosts)
            if is_too_short and self.model.config.num_positions > max_length:
                raise ValueError(f"{host.url} takes {max_length} tokens, fewer than the others.")
            probe_host = VllmHost(host.url, name)
            num_equal = sum(self._is_equal(probe_host, text) for text in PROBES)
            if num_equal < PROBES_EQUAL:
                raise ValueError(
                    f"{host.url}: the model {quote(name, self.hosts.key)!r} continues our "
                    f"embeddings of a text otherwise than its tokens ({num_equal} of "
                    f"{len(PROBES)} equal), so it is not the language model of this checkpoint. "
                    "Serve the folder of: python -m ltu.convert_checkpoint --model DIR "
                    "--merged_llm_dir DIR"
                )
            host.max_length = max_length
            host.model = name

    def _find_model(self, host: VllmHost) -> tuple[str, int]:
        """Return the name of a server's model, and how many tokens it takes.

        Raises:
            ValueError: it has several.
            ServerFailure: it does not say.
        """
        connection = self.hosts.connect(host)
        try:
            connection.request("GET", "/models")
            content = connection.read_json()
            try:
                # Adapters have a parent; several names of one model have the same root.
                cards = [card for card in content["data"] if not card.get("parent")]
                roots = {card.get("root") or card["id"] for card in cards}
                name = cards[0]["id"]
                max_length = cards[0].get("max_model_len") or self.model.config.num_positions
                is_valid = isinstance(name, str) and isinstance(max_length, int)
            except (TypeError, LookupError, AttributeError):
                is_valid = False
            if not is_valid:
                raise connection.fail("/models is no list of models")
            if len(roots) > 1:
                raise ValueError(f"{host.url} serves {len(roots)} models; give each its own.")
            return name, max_length
        finally:
            connection.close()

    def _check_name(self, host: VllmHost, name: str) -> None:
        """Check that a name that the converter made is that of this checkpoint.

        Raises:
            ValueError: it is that of another one.
        """
        prefix = served_name("")
        if not self.folder or not name.startswith(prefix):
            return
        hashes = [self.checkpoint]
        record = read_record(Path(self.folder))
        if record.get("stage") == "merged":
            # A merged folder has the language model of the one that it was made of.
            hashes.append(record["parent"]["sha256"])
        names = [served_name(sha256) for sha256 in hashes]
        if name not in names:
            raise ValueError(
                f"{host.url} serves {quote(name, self.hosts.key)}, which was made of another "
                "checkpoint than "
                f"{self.folder} ({' or '.join(names)})."
            )

    @torch.no_grad()
    def _is_equal(self, host: VllmHost, text: str) -> bool:
        """Return whether a server continues the tokens of a text and our embeddings alike."""
        tokens = self.processor.encode(text)
        embeds = encode_embeds(self._embed_prompt(tokens, None))
        continued = []
        for prompt in ({"prompt": tokens}, {"prompt_embeds": embeds}):
            received = ReceivedAnswer(None, threading.Event(), self, 1)
            settings = sampling_fields({"do_sample": False})
            body = prompt | {"max_tokens": 1} | settings | self._common_fields()
            self.hosts.stream(host, body, received)
            continued.append(received.tokens)
        return continued[0] == continued[1]


def sampling_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request for settings of `check_decoding`; temperature 0 is greedy."""
    fields = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    if settings["do_sample"]:
        fields["temperature"] = settings.get("temperature", 1.0)
        fields["top_p"] = settings.get("top_p", 1.0)
        fields["top_k"] = settings.get("top_k", 0)
    neutral = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    return fields | neutral


def make_seed(text: str) -> int:
    """Return a seed of 63 bits for a text, which says with what a prompt is sampled."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_vllm_decoding(decoding: dict[str, Any]) -> None:
    """Check that a vLLM server can generate with settings of `check_decoding`.

    Raises:
        ValueError: it cannot.
    """
    if decoding.get("num_beams", 1) > 1:
        raise ValueError("num_beams is for the model in this process: leave --engine vllm out.")
    if decoding.get("repetition_penalty", 1.0) != 1.0:
        raise ValueError(
            f"repetition_penalty is {decoding['repetition_penalty']}, but with --engine vllm it "
            "must be 1: the server gets embeddings, and does not know the prompt's tokens."
        )


def _for_request(on_text: OnText, index: int) -> OnText:
    """Return `on_text` for a single request, the one of that number."""
    return lambda _, text: on_text(index, text)


def _take_finished(running: dict[Future[Answer], int]) -> list[tuple[int, Answer]]:
    """Wait until an answer is complete; remove and return all that are."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    return [(running.pop(future), future.result()) for future in finished]
