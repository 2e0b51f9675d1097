"""Tests eval/judge.py against a server that fails.

It tests what counts as yes and no, and that no judgement is paid twice.
"""

import numpy as np
import pytest
from llm_server import FakeLlm, completion

from eval.judge import Judge, open_ended, parse_verdict
from eval.scorer_interface import Context, EvaluationError
from eval.tasks import find_task
from qa_generation.llm import LlmSettings

pytest.importorskip("openai")
TASK = find_task("open_ended")
ROWS = [
    {
        "prompt": "What barks?",
        "pred": "A dog {barks}.",
        "ref": "A dog.",
        "audio_id": "a.wav",
        "status": "ok",
    },
    # As the original writes it, without a reference.
    {"prompt": "Why?", "pred": "I like cheese.", "audio_id": "b.wav"},
    {"prompt": "Where?", "pred": "", "ref": "x", "audio_id": "c.wav", "status": "unreadable"},
    {"prompt": "When?", "pred": "Perhaps.", "ref": "x", "audio_id": "d.wav", "status": "truncated"},
    {"prompt": "Who?", "pred": "A man.", "ref": "x", "audio_id": "e.wav"},
    # The first again.
    {"prompt": "What barks?", "pred": "A dog {barks}.", "ref": "A dog.", "audio_id": "f.wav"},
]
REPLIES = {
    "What barks?": "Yes.",
    "Why?": "no, it does not",
    "When?": "It might, yes",
    "Who?": "Yes",
}
PROMPT = (
    "Below is a pair of question and response. Identify if the response answers the question. "
    "Return yes or no.\n\nQuestion: What barks?\nResponse: A dog {barks}."
)


def answer(body: dict) -> dict:
    content = body["messages"][0]["content"]
    return completion(
        next(reply for question, reply in REPLIES.items() if f"Question: {question}\n" in content)
    )


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (reply, True)
        for reply in ("yes", "Yes.", " YES!\n", "yes, it does", "Yes\nIt does.", "**Yes**", '"yes"')
    ]
    + [(reply, True) for reply in ("Yes - it does", "**Yes.** It does", "(yes)", "yes: a dog")]
    + [
        (reply, False)
        for reply in ("no", "No.", "NO\n", "No, yes would be wrong", "no; it says nothing", "'No'")
    ]
    + [
        (reply, None)
        for reply in (
            "",
            "Yes or no",
            "Yes it does",
            "no-one",
            "Not at all",
            "yes/no",
            "Answer: yes",
        )
    ]
    + [
        (reply, None)
        for reply in ("N/A", "The answer is yes.", "yesterday", "I say yes", "none", "nope.", "1")
    ],
)
def test_verdicts(reply: str, verdict: bool | None) -> None:
    assert parse_verdict(reply) is verdict


def test_rate_failures_and_what_is_recorded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("qa_generation.llm.LONGEST_WAIT", 0.02)
    with FakeLlm(answer, fault_fraction=0.5, seed=1) as server:
        settings = LlmSettings(
            "judge-1", temperature=0.0, max_tokens=16, base_url=server.url, max_wait=5.0
        )
        judge = Judge(settings, tmp_path)
        outcome = open_ended(ROWS, TASK, Context(judge=judge))
        assert [item["failed"] for item in outcome.items] == [
            None,
            None,
            "unreadable",
            "unparsed judgement",
            None,
            None,
        ]
        assert [item.get("follows") for item in outcome.items] == [
            True,
            False,
            False,
            None,
            True,
            True,
        ]
        assert outcome.items[3]["reply"] == "It might, yes"
        assert outcome.compute(np.arange(6)) == {TASK.metric: 0.6}, (
            "an unparsed judgement is not the model's failure"
        )
        assert np.isnan(outcome.compute(np.array([3]))[TASK.metric])
        assert outcome.compute(np.array([0, 1, 1, 4])) == {TASK.metric: 0.5}
        assert outcome.compute(np.array([0, 1, 4, 5])) == {TASK.metric: 0.75}
        assert sorted(server.paid.values()) == [1, 1, 1, 1], "equal questions are sent once"
        again = open_ended(ROWS, TASK, Context(judge=Judge(settings, tmp_path)))
        assert again.items == outcome.items and again.notes == outcome.notes
        assert sum(server.paid.values()) == 4, "the second run sent a request"
    record = judge.record()
    assert (record["model"], record["temperature"], record["base_url"]) == (
        "judge-1",
        0.0,
        server.url,
    )
    assert record["prompt"].startswith(PROMPT.partition("What")[0])
    assert any("judge-1" in note for note in outcome.notes)


def test_request(tmp_path) -> None:
    bodies = []
    with FakeLlm(lambda body: bodies.append(body) or completion("no")) as server:
        judge = Judge(
            LlmSettings("m", temperature=0.0, max_tokens=16, base_url=server.url), tmp_path
        )
        assert judge([("What barks?", "A dog {barks}.")]) == ["no"]
    messages = [{"role": "user", "content": PROMPT}]
    assert bodies == [{"model": "m", "messages": messages, "temperature": 0.0, "max_tokens": 16}]


def test_one_refused_request_and_a_judge_that_stops(tmp_path, capsys) -> None:
    with FakeLlm(answer) as server:
        settings = LlmSettings("m", temperature=0.0, base_url=server.url, concurrency=1)
        judge = Judge(settings, tmp_path)
        server.script = ["", "400"]
        outcome = open_ended(ROWS, TASK, Context(judge=judge))
        assert outcome.items[1]["failed"] == "judge failed" and "400" in capsys.readouterr().err
        assert outcome.compute(np.arange(6)) == {TASK.metric: 0.75}
        assert outcome.notes[1] == "2 judgements failed or are unparsed: they are in no metric"
        server.script = ["401"]
        with pytest.raises(EvaluationError, match="401.*judge-.*jsonl"):
            open_ended(ROWS, TASK, Context(judge=judge))
        outcome = open_ended(ROWS, TASK, Context(judge=judge))
        assert outcome.items[1]["follows"] is False, "a failed request is sent again"
        assert sorted(server.paid.values()) == [1, 1, 1, 1]
    with pytest.raises(EvaluationError, match="--judge_model"):
        open_ended(ROWS, TASK, Context())


def test_each_judge_has_its_own_replies(tmp_path) -> None:
    """Judges of the same name differ at two endpoints, and after new weights in a local folder."""
    for verdict in ("yes", "no"):
        with FakeLlm(lambda body, verdict=verdict: completion(verdict)) as server:
            settings = LlmSettings("m", temperature=0.0, base_url=server.url)
            assert Judge(settings, tmp_path)([("What barks?", "A dog.")]) == [verdict]
    found = []
    for weights in (b"1", b"2"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        found.append(Judge(LlmSettings(str(tmp_path), is_local=True), tmp_path))
    assert found[0].replies != found[1].replies and found[0].record() != found[1].record()


def test_without_answers_nothing_is_sent(tmp_path) -> None:
    judge = Judge(LlmSettings("m", base_url="http://127.0.0.1:9/v1"), tmp_path)
    outcome = open_ended([ROWS[2], ROWS[1] | {"pred": " "}], TASK, Context(judge=judge))
    assert [item["failed"] for item in outcome.items] == ["unreadable", "empty answer"]
    assert outcome.compute(np.arange(2)) == {TASK.metric: 0.0}
