"""Tests that requests that are paused and continue have the answers that they have in one piece."""

from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ltu.inference.engine import LtuEngine
from ltu.inference.requests import Answer, Request
from ltu.inference.row_cache import join_caches, split_cache
from tests import tiny

SAMPLED = {"do_sample": True, "temperature": 1.2, "top_k": 100}
PENALTY = {"repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LtuEngine:
    root = tmp_path_factory.mktemp("pausing")
    return open_engine(root, "llama")


def open_engine(root: Path, model_type: str, **settings: object) -> LtuEngine:
    llm = tiny.write_llm(root / "llm", model_type, **settings)
    return LtuEngine.from_pretrained(tiny.write_checkpoint(root / "ltu", llm))


def make_requests() -> list[Request]:
    """Requests of many lengths; greedy, sampled and with a repetition penalty."""
    requests = []
    for number in range(9):
        decoding: dict = {"max_new_tokens": 5 + 4 * number}
        if number % 3 == 1:
            decoding |= SAMPLED
        if number % 2:
            decoding |= PENALTY
        clip = None if number % 4 == 0 else tiny.clip(number, 1.0)
        question = "What is it? " + "why " * number
        requests.append(Request(question, clip, decoding=decoding, seed=number, num_chunks=0))
    return requests


class Run:
    """Runs requests in turns.

    Attributes:
        answers: by the number of a request.
        texts: those that were shown, by the number of a request.
        delivered: the order in which answers came.
        turns: the numbers of the requests of each turn.
    """

    def __init__(self, engine: LtuEngine, tokens_per_turn: int, batch_size: int):
        self.engine = engine
        self.tokens_per_turn = tokens_per_turn
        self.batch_size = batch_size
        self.answers: dict[int, Answer] = {}
        self.texts: dict[int, list[str]] = {}
        self.delivered: list[int] = []
        self.turns: list[list[int]] = []
        self.cancelled_after: dict[int, int] = {}

    def run(self, requests: list[Request]) -> list[Answer]:
        waiting = deque(enumerate(requests))
        while waiting:
            batch = []
            while waiting and len(batch) < self.batch_size:
                batch.append(waiting.popleft())
            self.turns.append([number for number, _ in batch])
            waiting.extend(self.run_turn(batch))
        return [self.answers[number] for number in range(len(requests))]

    def run_turn(self, batch: list[tuple[int, Request]]) -> list[tuple[int, Request]]:
        """Run a turn; return what was paused."""
        numbers = [number for number, _ in batch]

        def on_text(index: int, text: str) -> bool:
            shown = self.texts.setdefault(numbers[index], [])
            shown.append(text)
            return len(shown) <= self.cancelled_after.get(numbers[index], 1000)

        paused = []
        for index, result in self.engine.run(
            [request for _, request in batch],
            len(batch),
            on_text=on_text,
            on_answer=lambda index, _: self.delivered.append(numbers[index]),
            is_turn_over=lambda num_tokens: num_tokens >= self.tokens_per_turn,
        ):
            if isinstance(result, Answer):
                self.answers[numbers[index]] = result
            else:
                paused.append((numbers[index], result))
        return paused


@pytest.mark.parametrize("tokens_per_turn, batch_size", [(1, 4), (3, 3), (7, 5), (16, 9)])
def test_answers_do_not_depend_on_pauses(
    engine: LtuEngine, tokens_per_turn: int, batch_size: int
) -> None:
    requests = make_requests()
    alone = [engine([request])[0] for request in requests]
    assert len({answer.text for answer in alone}) == len(alone)
    run = Run(engine, tokens_per_turn, batch_size)
    assert run.run(requests) == alone
    assert len(run.turns) > len(requests) / batch_size
    # A stream goes on where it stopped.
    for number, answer in enumerate(alone):
        texts = [*run.texts[number], answer.text]
        assert all(later.startswith(sooner) for sooner, later in pairwise(texts))


@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("mistral", {"sliding_window": 256}),
        ("gemma2", {"sliding_window": 256}),
    ],
)
def test_language_models_whose_positions_or_caches_differ(
    tmp_path: Path, model_type: str, settings: dict
) -> None:
    """Learned positions, and caches that cannot be taken apart, which are computed again."""
    engine = open_engine(tmp_path, model_type, **settings)
    requests = make_requests()
    alone = [engine([request])[0] for request in requests]
    assert Run(engine, 5, 4).run(requests) == alone


def test_static_caches_are_computed_again(engine: LtuEngine) -> None:
    requests = make_requests()
    alone = [engine([request])[0] for request in requests]
    static = LtuEngine(engine.model, engine.processor, folder=engine.folder, static_cache="on")
    assert Run(static, 5, 3).run(requests) == alone


def test_a_request_with_a_dynamic_cache_continues_with_a_static_one(engine: LtuEngine) -> None:
    request = Request("Why?", tiny.clip(1), decoding={"max_new_tokens": 9})
    run = Run(engine, 4, 1)
    [(_, paused)] = run.run_turn([(0, request)])
    assert paused.paused.cache is not None
    static = LtuEngine(engine.model, engine.processor, folder=engine.folder, static_cache="on")
    assert Run(static, 400, 1).run([paused]) == engine([request])


def test_an_answer_does_not_wait_for_its_batch(engine: LtuEngine) -> None:
    """A short answer is delivered before the next token of a longer one, also without a pause."""
    lengths = [40, 3, 12, 25]
    requests = [Request("Why?", decoding={"max_new_tokens": length}) for length in lengths]
    delivered: list[tuple[int, int]] = []
    num_texts = [0] * len(lengths)

    def on_text(index: int, text: str) -> None:
        num_texts[index] += 1

    def on_answer(index: int, answer: Answer) -> None:
        delivered.append((index, num_texts[0] - 1))  # One text, the empty one, is from the start.
        assert answer.new_tokens == lengths[index]

    answers = dict(engine.run(requests, 4, on_text=on_text, on_answer=on_answer, min_new_tokens=40))
    assert delivered == [(1, 3), (2, 12), (3, 25), (0, 40)]
    assert [answers[index].new_tokens for index in range(4)] == lengths


def test_a_clip_without_an_answer_does_not_wait(engine: LtuEngine) -> None:
    requests = [Request("Why?", decoding={"max_new_tokens": 9}), Request("Why?", b"no sound")]
    run = Run(engine, 4, 2)
    answers = run.run(requests)
    assert run.delivered == [1, 0]
    assert [answer.status for answer in answers] == ["ok", "unreadable"]


def test_cancelled_while_it_runs_and_while_it_is_paused(engine: LtuEngine) -> None:
    requests = [Request("Why?", decoding={"max_new_tokens": 20})] * 3
    whole = engine(requests[:1])[0]
    run = Run(engine, 4, 3)
    # The empty text, four tokens, the text at the beginning of the next turn, and a token more.
    run.cancelled_after = {0: 5, 1: 6}
    first, second, third = run.run(requests)
    assert (first.finish_reason, first.new_tokens) == ("cancelled", 4)
    assert (second.finish_reason, second.new_tokens) == ("cancelled", 5)
    assert third == whole
    assert first.text and whole.text.startswith(first.text)
    assert second.text and whole.text.startswith(second.text)


def test_beams_and_a_minimum_are_not_paused(engine: LtuEngine) -> None:
    for decoding in ({"num_beams": 2}, {"min_new_tokens": 12}):
        request = Request("Why?", tiny.clip(1), decoding={"max_new_tokens": 12} | decoding)
        run = Run(engine, 1, 2)
        assert run.run([request]) == engine([request])
        assert len(run.turns) == 1


def test_positions_end_where_they_end_without_pauses(
    engine: LtuEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.model.config.text_config, "max_position_embeddings", 96)
    request = Request("why " * 10, tiny.clip(2), decoding={"max_new_tokens": 400})
    alone = engine([request])
    assert alone[0].prompt_tokens + alone[0].new_tokens == 96
    assert Run(engine, 4, 1).run([request]) == alone


def test_the_prompt_goes_through_the_model_once(
    engine: LtuEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first turn of a request has a forward pass over more than a token."""
    lengths = []
    forward = type(engine.model.language_model).forward

    def record(*args: object, **kwargs: torch.Tensor):
        lengths.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(engine.model.language_model), "forward", record)
    requests = [Request("Why?", tiny.clip(i), decoding={"max_new_tokens": 12}) for i in range(4)]
    Run(engine, 3, 2).run(requests)
    assert sum(length > 1 for length in lengths) == 2
    assert len(lengths) == 2 * 12


@torch.no_grad()
def test_rows_of_a_cache(engine: LtuEngine) -> None:
    """Rows that were split and joined have the values that they had, without padding."""
    ids = torch.randint(3, 500, (3, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]])
    output = engine.model(ids, mask, use_cache=True)
    rows = split_cache(output, mask, [2, 1])
    assert [row.length for row in rows] == [4, 4]
    short = split_cache(output, mask * torch.tensor([1, 1, 1, 1, 0, 0]), [1])[0]
    assert short.length == 2 and short.nbytes == rows[0].nbytes / 2
    joined = join_caches([rows[0], short])
    layer = joined.layers[1]
    assert layer.keys.shape[:1] + layer.keys.shape[2:3] == (2, 4)
    assert torch.equal(layer.keys[0], rows[0].layers[1][0])
    assert torch.equal(layer.values[1, :, 2:], short.layers[1][1])
    assert not layer.keys[1, :, :2].any()
