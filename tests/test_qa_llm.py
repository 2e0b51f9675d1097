"""Tests the client of LLMs: retries, reserved tokens, malformed responses, keys, local models."""

import time
from itertools import pairwise

import pytest
from llm_server import FakeLlm, completion

import qa_generation.llm
from qa_generation.generate import main
from qa_generation.llm import (
    GenerationStopped,
    Llm,
    LlmSettings,
    Reply,
    ReplyStore,
    RequestFailed,
    estimate_tokens,
)
from tests.qa_runs import (  # noqa: F401
    HELLO,
    ROOT,
    arguments,
    good,
    quick_client,
)


def test_no_key_for_openai(tmp_path):
    hint = "set OPENAI_API_KEY, or OPENAI_BASE_URL for another endpoint"
    with pytest.raises(ValueError, match=hint):
        main(arguments(tmp_path, "https://api.openai.com/v1"))
    with (
        pytest.raises(StopIteration),
        ReplyStore(tmp_path / "s") as store,
    ):  # Other endpoints need none.
        Llm(LlmSettings("m", base_url="http://127.0.0.1:9/v1"), store)
        raise StopIteration


def test_an_invalid_key_is_not_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one\nsk-two")
    with (
        pytest.raises(ValueError, match="OPENAI_API_KEY") as caught,
        ReplyStore(tmp_path / "s") as store,
    ):
        Llm(LlmSettings("m", base_url="http://127.0.0.1:9/v1"), store)
    assert "sk-" not in str(caught.value)


def test_retry_after_delays_all_requests(tmp_path):
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = ["429 0.3"]
        llm = Llm(LlmSettings("m", base_url=server.url, concurrency=1), store)
        assert len(llm.complete_all([[{"role": "user", "content": str(i)}] for i in range(3)])) == 3
        assert server.times[1] - server.times[0] >= 0.3
        server.script = ["429 9999"]  # Longer than max_wait: only this request fails.
        replies = llm.complete_all([[{"role": "user", "content": f"again {i}"}] for i in range(3)])
        assert [isinstance(reply, RequestFailed) for reply in replies] == [True, False, False]


@pytest.mark.parametrize("wait", ["0", "-5", "Mon, 01 Jan 2024 00:00:00 GMT", "nan"])
def test_a_retry_after_of_zero_is_ignored(tmp_path, monkeypatch, wait):
    monkeypatch.setattr(qa_generation.llm, "LONGEST_WAIT", 0.2)
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [f"429 {wait}"] * 2
        reply = Llm(LlmSettings("m", base_url=server.url), store).complete_all(
            [[{"role": "user", "content": "a"}]]
        )[0]
        assert (
            reply.text and min(later - earlier for earlier, later in pairwise(server.times)) >= 0.1
        )


@pytest.mark.parametrize("wait", ["1e400", "99999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_huge_retry_after_is_not_waited_for(tmp_path, wait):
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [f"429 {wait}"] * 100
        start = time.monotonic()
        with pytest.raises(GenerationStopped, match="20 requests failed one after the other"):
            prompts = [[{"role": "user", "content": str(i)}] for i in range(60)]
            Llm(LlmSettings("m", base_url=server.url, concurrency=4), store).complete_all(prompts)
        assert time.monotonic() - start < 60 and len(server.times) <= 24


def test_an_endpoint_that_is_gone_stops_the_run(tmp_path):
    settings = LlmSettings("m", base_url="http://127.0.0.1:9/v1", tries=2)
    with (
        ReplyStore(tmp_path / "s") as store,
        pytest.raises(GenerationStopped, match="one after the other"),
    ):
        Llm(settings, store).complete_all(
            [[{"role": "user", "content": str(i)}] for i in range(500)]
        )


def test_no_request_is_sent_after_a_caller_fails(tmp_path):
    """Whatever error the caller's function raises, it is raised, and the other requests stop."""
    prompts = [[{"role": "user", "content": str(i)}] for i in range(5)]

    def fail(index: int, reply: Reply | RequestFailed) -> None:
        raise LookupError("of the caller")

    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        llm = Llm(LlmSettings("m", base_url=server.url, concurrency=1), store)
        with pytest.raises(LookupError, match="of the caller"):
            llm.complete_all(prompts, fail)
        assert len(server.times) == 1 and len(store.offsets) == 1


def test_equal_requests_are_sent_once(tmp_path):
    """The replies are in order, the settings recorded, and equal requests paid once.

    A judge sends such requests, also at the same time.
    """
    prompts = [[{"role": "user", "content": f"question {i % 4}"}] for i in range(20)]
    with FakeLlm(good, delay=0.05) as server, ReplyStore(tmp_path / "s") as store:
        url = server.url.replace("//", "//user:pass@")
        settings = LlmSettings(
            "judge", temperature=0.0, base_url=url, extra={"max_tokens": None, "top_p": 0.5}
        )
        llm = Llm(settings, store)
        indices = []
        replies = llm.complete_all(prompts, lambda index, reply: indices.append(index))
        assert sorted(indices) == list(range(20)) and server.paid.total() == 4
        assert [reply.text for reply in replies[:4]] * 5 == [reply.text for reply in replies]
        assert replies[0].model == "m-0301" and store.tokens == 4 * 150
        assert llm.request(prompts[0]) == {
            "model": "judge",
            "messages": prompts[0],
            "temperature": 0.0,
            "top_p": 0.5,
        }
    assert "pass" not in str(settings.record()) and settings.record()["temperature"] == 0.0


@pytest.mark.parametrize(
    "extra, tokens",
    [
        ({}, 1024),
        ({"max_tokens": 50}, 50),
        ({"max_tokens": None, "max_completion_tokens": 4000}, 4000),
        ({"max_completion_tokens": 70}, 1024),
    ],
)
def test_the_maximum_cost_of_a_request_is_reserved(tmp_path, extra, tokens):
    need = estimate_tokens(HELLO) + tokens
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        with pytest.raises(GenerationStopped, match="token budget"):
            Llm(
                LlmSettings("m", base_url=server.url, extra=extra, token_budget=need - 1), store
            ).complete_all([HELLO])
        assert not server.times
        settings = LlmSettings("m", base_url=server.url, extra=extra, token_budget=need)
        assert Llm(settings, store).complete_all([HELLO])[0].text
        assert (store.tokens, store.unanswered_tokens) == (150, 0)


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 2},
        {"stream": True},
        {"messages": []},
        {"model": "x"},
        {"max_tokens": "9"},
        {"max_tokens": 0},
    ],
)
def test_extra_that_would_break_the_accounts(extra):
    with pytest.raises(ValueError, match=next(iter(extra))):
        LlmSettings("m", extra=extra)


def test_a_budget_needs_a_longest_reply():
    with pytest.raises(ValueError, match="max_completion_tokens"):
        LlmSettings("m", extra={"max_tokens": None}, token_budget=5000)


@pytest.mark.parametrize(
    "fault, tries", [("time-out", 4), ("drop", 4), ("half a body", 4), ("504", 4), ("HTML", 3)]
)
def test_lost_tries_count_as_reserved(tmp_path, capsys, fault, tries):
    """Four tries of 991 + 9 tokens fit the budget.

    After they are lost, no fifth is sent, in this run or the next.
    """
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [fault] * 20
        limits = {"timeout": 0.3, "token_budget": 4000 if tries == 4 else 3999}
        settings = LlmSettings("m", base_url=server.url, max_tokens=991, concurrency=2, **limits)
        for _ in range(2):
            with pytest.raises(
                GenerationStopped, match=f"{1000 * tries} reserved for tries without a reply"
            ):
                Llm(settings, store).complete_all([HELLO, [{"role": "user", "content": "other"}]])
        assert len(server.times) == tries
        assert (store.tokens, store.unanswered_tokens) == (0, 1000 * tries)
    with ReplyStore(tmp_path / "s") as store:
        assert store.unanswered_tokens == 1000 * tries


@pytest.mark.parametrize("fault", ["429", "500", "503", "error in a 200"])
def test_tries_that_nobody_bills_cost_nothing(tmp_path, fault):
    with FakeLlm(good) as server, ReplyStore(tmp_path / "s") as store:
        server.script = [fault] * 5
        settings = LlmSettings("m", base_url=server.url, max_tokens=991, token_budget=1000)
        assert Llm(settings, store).complete_all([HELLO])[0].text
        assert (store.tokens, store.unanswered_tokens) == (150, 0)
        gone = LlmSettings("m", base_url="http://127.0.0.1:9/v1", tries=2)
        assert isinstance(
            Llm(gone, store).complete_all([[{"role": "user", "content": "x"}]])[0], RequestFailed
        )
        assert store.unanswered_tokens == 0  # No endpoint was there to bill it.


def test_prompts_are_not_estimated_too_low():
    """The estimates are compared with the counts of a real tokenizer (SmolLM2's, one per digit).

    The texts are times of events, English and Chinese.
    """
    events = (
        f"Sound Events: Dog: [{', '.join(f'{i / 3:.1f}s-{i / 3 + 0.2:.1f}s' for i in range(25))}]"
    )
    prompt = (ROOT / "qa_generation/prompts/sounds.txt").read_text()
    for text, tokens in (
        (events, 280),
        (prompt, 245),
        ("下雨了，狗在叫，人们在街上走。" * 10, 230),
    ):
        assert tokens <= estimate_tokens([{"role": "user", "content": text}]) <= 1.5 * tokens + 20


def with_choice(change: dict) -> dict:
    body = completion('{"q": "What is it then?", "a": "It is a dog near the road."}')
    return body | {"choices": [body["choices"][0] | change]}


# A body, and the text, finish_reason, prompt tokens and completion tokens that are stored. None
# means that there is no reply after 3 tries.
PAID = [
    (with_choice({"message": {"content": None}}), ("", "stop", 100, 50)),
    (with_choice({"message": {"content": None, "refusal": "no"}, "finish_reason": None}),
     ("", "stop", 100, 50)),
    (with_choice({"message": {"content": [{"type": "text", "text": "a"}, {"text": "b"}, 5]}}),
     ("ab", "stop", 100, 50)),
    (with_choice({"message": {"content": "a"}, "finish_reason": 5}) | {"model": 7},
     ("a", "stop", 100, 50)),
    (with_choice({"message": {"content": "a"}})
     | {"usage": {"prompt_tokens": -9, "completion_tokens": True}}, ("a", "stop", 9, 9)),
    (with_choice({"message": {"content": "hello"}}) | {"usage": [1]}, ("hello", "stop", 9, 9)),
    (with_choice({"message": {"content": "a"}, "finish_reason": "length"}),
     ("a", "length", 100, 50)),
    (completion("") | {"choices": []}, None),
    (completion("") | {"choices": None}, None),
    ({"choices": [{"message": {"content": 5}}]}, None),
    ([], None),
]  # fmt: skip


@pytest.mark.parametrize("body, stored", PAID)
def test_malformed_responses(tmp_path, body, stored):
    with FakeLlm(lambda _: body) as server, ReplyStore(tmp_path / "s") as store:
        reply = Llm(LlmSettings("m", base_url=server.url), store).complete_all([HELLO])[0]
        if stored is None:
            # Each of the tries may have been billed.
            assert isinstance(reply, RequestFailed) and len(server.times) == 3
        else:
            found = (reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens)
            assert found == stored and len(server.times) == 1


def test_local_model(tmp_path):
    """A tiny random model replaces an endpoint.

    Its replies are batched and stored, and greedy replies do not depend on the batch.
    """
    from tiny import write_llm

    write_llm(tmp_path / "llm")
    prompts = [[{"role": "user", "content": "dog " * (i + 1)}] for i in range(3)]
    settings = {"is_local": True, "temperature": 0.0, "max_tokens": 6}
    with ReplyStore(tmp_path / "s") as store:
        llm = Llm(LlmSettings(str(tmp_path / "llm"), **settings), store)
        replies = llm.complete_all(prompts)
        assert len(store.offsets) == 3 and all(
            0 < reply.completion_tokens <= 6 for reply in replies
        )
        assert llm.complete_all(prompts) == replies and llm.counts["answered"] == 3
    with ReplyStore(tmp_path / "t") as store:
        llm = Llm(LlmSettings(str(tmp_path / "llm"), concurrency=1, **settings), store)
        assert [reply.text for reply in llm.complete_all(prompts)] == [
            reply.text for reply in replies
        ]


def test_local_model_uses_max_new_tokens(tmp_path):
    from tiny import write_llm

    write_llm(tmp_path / "llm")
    with ReplyStore(tmp_path / "s") as store:
        settings = {
            "is_local": True,
            "extra": {"max_new_tokens": 3},
            "token_budget": estimate_tokens(HELLO) + 3,
        }
        assert (
            Llm(LlmSettings(str(tmp_path / "llm"), **settings), store)
            .complete_all([HELLO])[0]
            .completion_tokens
            < 4
        )
