"""Tests that answers by servers that take prompt embeddings equal those of the model here.

The servers (`tests/vllm_server.py`) implement the documented request of vLLM, which itself is not
run.
"""

import gc
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ltu.convert_checkpoint import main as convert
from ltu.inference.engine import LtuEngine
from ltu.inference.generation_flags import parse_urls
from ltu.inference.requests import Request
from ltu.inference.vllm_client import (
    MAX_EVENT,
    ServerFailure,
    VllmHost,
    encode_embeds,
    parse_url,
)
from ltu.inference.vllm_engine import FAILURES_IN_ROW, ReceivedAnswer, VllmEngine
from ltu.inference_batch import main as answer_questions
from ltu.serve import main as serve_command
from ltu_as.convert_checkpoint import main as convert_as
from tests import tiny
from tests.machine import PATIENCE, wait_until
from tests.test_serve import serve
from tests.vllm_server import KEY, FakeVllm
from tests.whisper_tiny import write_ltu_as

DECODING = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both models with one language model, and what a server gets of each."""
    root = tmp_path_factory.mktemp("vllm")
    llm = tiny.write_llm(root / "llm")
    tiny.write_checkpoint(root / "ltu", llm, tiny.LORA)
    write_ltu_as(root / "ltu_as", llm)
    convert(["--model", f"{root}/ltu", "--merged_llm_dir", f"{root}/ltu_llm"])
    convert_as(["--model", f"{root}/ltu_as", "--merged_llm_dir", f"{root}/ltu_as_llm"])
    return root


@pytest.fixture(scope="module")
def local(root: Path) -> LtuEngine:
    return LtuEngine.from_pretrained(root / "ltu", device="cpu")


@pytest.fixture
def server(root: Path) -> Iterator[FakeVllm]:
    with FakeVllm(root / "ltu_llm") as running:
        yield running


@pytest.fixture
def connect(root: Path) -> Callable[..., VllmEngine]:
    """`connect(server, ..., kind="ltu")`: an engine on these servers."""

    def make(*servers: FakeVllm, kind: str = "ltu", **settings: float) -> VllmEngine:
        urls = [server.url for server in servers]
        return VllmEngine.from_pretrained(root / kind, urls, device="cpu", **settings)

    return make


def mixture() -> list[Request]:
    """Questions with and without a clip, several about one, of several chunks, and a bad one."""
    requests = [Request("What is it?", tiny.clip(0)), Request("Where is it, far away?")]
    requests += [Request(f"Why {'so ' * count}loud?", tiny.clip(1)) for count in range(3)]
    requests.append(Request("And all of it?", tiny.clip(2, 2.5), num_chunks=0))
    requests.append(Request("What is said?", tiny.clip(3), transcript="a dog barks"))
    requests.append(Request("What is this?", "nowhere.wav"))
    requests.append(Request("Short?", tiny.clip(4), decoding={"max_new_tokens": 3}))
    return requests


def unused_url() -> str:
    """The address of a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


# --- what a server gets


@pytest.mark.parametrize("model_type, is_tied", [("llama", False), ("qwen2", True)])
def test_merged_language_model_is_a_stock_folder(tmp_path, model_type, is_tied, capsys):
    llm = tiny.write_llm(tmp_path / "llm", model_type, tie_word_embeddings=is_tied)
    folder = tiny.write_checkpoint(tmp_path / "ltu", llm, tiny.LORA)
    convert(["--model", str(folder), "--merged_llm_dir", str(tmp_path / "merged")])
    assert f"vllm serve {tmp_path / 'merged'} --enable-prompt-embeds" in capsys.readouterr().out
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys"))
    engine = LtuEngine.from_pretrained(folder, device="cpu")
    batch = engine.inputs([Request("What is it?", tiny.clip(0))])
    with torch.no_grad():
        ours = engine.model(**batch).logits
        embeds = engine.model._embed(batch["input_ids"], audio_embeds=batch["audio_embeds"])
        theirs = stock(inputs_embeds=embeds).logits
        plain = AutoModelForCausalLM.from_pretrained(llm)(inputs_embeds=embeds).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert (plain - ours).abs().max() > 1e-2  # LoRA changes something.
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == model_type and config["architectures"] == [type(stock).__name__]
    assert stock.generation_config.eos_token_id == engine.model.generation_config.eos_token_id
    if model_type == "llama":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert len(tokenizer) == len(engine.processor.tokenizer)


def test_embedding_prompts_needs_no_layer(root, server, connect, local):
    engine = connect(server)
    real = {name for name, value in engine.model.named_parameters() if not value.is_meta}
    llm = {name for name in real if name.startswith("language_model.")}
    assert llm == {"language_model.model.embed_tokens.weight"}
    own = {name for name, _ in local.model.named_parameters() if "language_model." not in name}
    assert real - llm == own


def test_request_body(server, connect):
    request = Request("What is it?", tiny.clip(0), decoding={"min_new_tokens": 2})
    answer = connect(server)([request], **DECODING)[0]
    body = server.bodies[0]
    data = body.pop("prompt_embeds")
    assert isinstance(data, str) and len(server.bodies) == 1
    assert body.pop("seed") >= 0
    assert body == {
        "model": server.name,
        "max_tokens": 12,
        "min_tokens": 2,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "stream": True,
        "return_token_ids": True,
        "stop_token_ids": [2],
        "ignore_eos": True,
    }
    assert answer.new_tokens == 12


def test_embeds_are_sent_without_the_storage_behind_them():
    table = torch.randn(1000, 8)
    assert len(encode_embeds(table[:2])) < len(encode_embeds(table)) / 5


# --- equal answers


@pytest.mark.parametrize("kind", ["ltu", "ltu_as"])
def test_answers_equal_those_of_the_model_here(root, connect, kind):
    here = LtuEngine.from_pretrained(root / kind, device="cpu")
    with FakeVllm(root / f"{kind}_llm") as server:
        there = connect(server, kind=kind)
        # Let an answer end in its middle, by a token that occurs in it.
        batch = here.inputs(mixture()[:1])
        tokens = here.model.generate(**batch, max_new_tokens=6, do_sample=False)[0].tolist()
        for engine in (here, there):
            engine.model.generation_config.eos_token_id = [2, tokens[-2]]
        expected = here(mixture(), **DECODING)
        assert there(mixture(), batch_size=4, **DECODING) == expected
    assert {answer.status for answer in expected} == {"ok", "missing"}
    if kind == "ltu":  # A chunk of the other has 10 seconds.
        assert max(answer.num_chunks for answer in expected) > 1
    assert {answer.finish_reason for answer in expected} == {"stop", "length", None}


def test_a_merged_checkpoint_embeds_the_same(root, local, tmp_path):
    convert(["--model", str(root / "ltu"), "--merge", "--output_dir", str(tmp_path / "merged")])
    # The name is that of the checkpoint which both folders were made of.
    with FakeVllm(root / "ltu_llm", name=f"ltu-{local.checkpoint[:12]}") as server:
        there = VllmEngine.from_pretrained(tmp_path / "merged", [server.url], device="cpu")
        texts = [answer.text for answer in there(mixture(), **DECODING)]
    assert texts == [answer.text for answer in local(mixture(), **DECODING)]


def test_stream(server, connect, local):
    request = mixture()[0]
    expected = list(local.stream(request, **DECODING))
    assert list(connect(server).stream(request, **DECODING)) == expected
    assert len(expected) > 3


def test_fewer_positions_on_the_server(root, connect, local):
    with FakeVllm(root / "ltu_llm", max_length=40) as server:
        there = connect(server)
        answer = there([Request("What is it?", tiny.clip(0))])[0]
        assert answer.prompt_tokens + answer.new_tokens == 40
        assert there([Request("long " * 50)])[0].status == "too_long"


def test_sampling_is_repeatable_and_seeded(server, connect):
    there = connect(server)
    request = Request("What is it?", tiny.clip(0))
    decoding = DECODING | {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9}
    texts = [there([request], seed=seed, **decoding)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    body = server.bodies[0]
    assert [body[name] for name in ("temperature", "top_k", "top_p")] == [1.5, 50, 0.9]
    assert server.bodies[2]["seed"] != body["seed"]


@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"repetition_penalty": 1.1}])
def test_what_cannot_be_equal_is_refused(server, connect, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.*--engine vllm"):
        connect(server)([Request("Why?")], **setting)
    assert server.bodies == []


def test_scores_are_refused(server, connect):
    with pytest.raises(ValueError, match="leave --engine vllm out"):
        connect(server).score(Request("Why?"), ["a"])


# --- servers that fail


def test_hosts_take_turns(root, connect, local):
    with FakeVllm(root / "ltu_llm") as one, FakeVllm(root / "ltu_llm") as other:
        there = connect(one, other)
        assert there(mixture(), batch_size=2, **DECODING) == local(mixture(), **DECODING)
        assert {len(one.bodies), len(other.bodies)} == {4}


def test_a_host_that_is_gone_is_left_out(root, connect, local, capsys):
    with FakeVllm(root / "ltu_llm") as server:
        urls = [unused_url(), server.url]
        there = VllmEngine.from_pretrained(root / "ltu", urls, device="cpu")
        assert f"warning: {urls[0]}" in capsys.readouterr().err
        assert there(mixture(), **DECODING) == local(mixture(), **DECODING)
        assert there.hosts.hosts[0].failures >= 1
        # A run that is continued when this host is back finds the answers of before.
        assert there.backend == ["vllm", server.name]


@pytest.mark.parametrize(
    "fault", ["429 0", "503 0", "500", "cut off", "no JSON", "error event", "no token_ids"]
)
def test_a_failure_is_retried(server, connect, local, fault):
    there = connect(server)
    server.script = [fault] * 2
    requests = mixture()[:2]
    assert there(requests, **DECODING) == local(requests, **DECODING)
    assert server.script == []


@pytest.mark.parametrize(
    "fault, status, reason",
    [
        ("429 0", "engine_busy", "status 429: no"),
        ("503 0", "engine_busy", "status 503: no"),
        ("502", "engine_failed", "status 502"),
        ("400", "engine_failed", "status 400"),
        ("cut off", "engine_failed", "cut off"),
        ("no JSON", "engine_failed", "no JSON object"),
        ("error event", "engine_failed", "EngineDeadError"),
        ("no token_ids", "engine_failed", "token_ids"),
    ],
)
def test_a_failure_is_reported(root, connect, monkeypatch, fault, status, reason):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr("ltu.inference.vllm_client.FIRST_PAUSE", 0.01)
    with FakeVllm(root / "ltu_llm", key=KEY) as server:
        there = connect(server)
        server.script = [fault] * 4
        failed, answered = there([Request("Why?"), Request("How?")], batch_size=1, **DECODING)
        # A request that the server refuses is not sent again.
        if fault == "400":
            assert answered.status == status and len(server.script) == 2
            return
        assert server.script == []
    assert (failed.status, failed.text, answered.status) == (status, "", "ok")
    assert reason in failed.error and server.url in failed.error
    assert KEY not in failed.error and "\n" not in failed.error


def test_a_silent_server_times_out(server, connect, monkeypatch):
    monkeypatch.setattr("ltu.inference.vllm_client.FIRST_PAUSE", 0.01)
    there = connect(server)
    there.hosts.idle_seconds = 0.2
    server.script = ["silence"] * 4
    answer = there([Request("Why?")], **DECODING)[0]
    assert answer.status == "engine_failed" and "time-out" in answer.error


def test_a_server_that_sends_no_token_times_out(server, connect):
    there = connect(server)
    there.hosts.connect_seconds = there.hosts.idle_seconds = 1.0
    server.script = ["hang"]
    received = ReceivedAnswer(None, threading.Event(), there, 12)
    body = {"prompt": [1, 2], "max_tokens": 12, "stream": True}
    with pytest.raises(ServerFailure, match="no token for 2 s"):
        there.hosts.stream(there.hosts.hosts[0], body, received)
    wait_until(lambda: server.aborted == 1)


def test_no_part_of_the_key_is_quoted(root, connect, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr("ltu.inference.vllm_client.FIRST_PAUSE", 0.01)
    with FakeVllm(root / "ltu_llm", key=KEY) as server:
        there = connect(server)
        server.script = ["echo"] * 4
        answer = there([Request("Why?")], **DECODING)[0]
    assert "xxxBearer ***" in answer.error
    other = tiny.write_llm(tmp_path / "other", seed=1)
    for name in (f"\x1b[2J{KEY}", f"ltu-{KEY}"):
        with FakeVllm(other, name=name, key=KEY) as server:
            with pytest.raises(ValueError, match=r"\*\*\*") as error:
                connect(server)
        assert KEY not in str(error.value) and str(error.value).isprintable()


def test_an_endless_event_is_not_read(server, connect, monkeypatch):
    monkeypatch.setattr("ltu.inference.vllm_client.MAX_EVENT", 60)
    with pytest.raises(ConnectionError, match="over 60 bytes"):
        connect(server)
    assert MAX_EVENT >= 2**20


def test_a_run_ends_when_no_server_is_there(root, connect, monkeypatch):
    monkeypatch.setattr("ltu.inference.vllm_client.FIRST_PAUSE", 0.001)
    with FakeVllm(root / "ltu_llm") as server:
        there = connect(server)
    requests = [Request(f"Why {number}?") for number in range(100)]
    results = []
    with pytest.raises(ConnectionError, match=f"{FAILURES_IN_ROW} questions in a row"):
        results.extend(there.run(requests, 4, **DECODING))
    assert there([requests[0]], **DECODING)[0].status == "engine_failed"


def test_shown_text_is_not_generated_again(server, connect):
    there = connect(server)
    server.script = ["cut off"]
    *texts, answer = there.stream(Request("What is it?", tiny.clip(0)), **DECODING)
    assert texts and answer.status == "engine_failed" and "cut off" in answer.error
    assert server.bodies and server.script == []


# --- the wrong server


def test_another_model_is_refused(root, connect, tmp_path):
    other = tiny.write_llm(tmp_path / "other", seed=1)
    with FakeVllm(other) as server, pytest.raises(ValueError, match="not the language model"):
        connect(server)


def test_another_size_is_refused(root, connect, tmp_path):
    wide = tiny.write_llm(tmp_path / "wide", hidden_size=128, head_dim=32)
    with FakeVllm(wide) as server, pytest.raises(ValueError, match="hidden_size 64"):
        connect(server)


def test_the_name_of_another_checkpoint_is_refused(root, connect, local):
    own = f"ltu-{local.checkpoint[:12]}"
    with FakeVllm(root / "ltu_llm", name=own) as server:
        assert connect(server).backend == ["vllm", own]
    with FakeVllm(root / "ltu_llm", name="ltu-0123456789ab") as server:
        with pytest.raises(ValueError, match=f"another checkpoint.*{own}"):
            connect(server)


def test_a_server_that_began_to_run_with_another_model_is_left_out(root, connect, tmp_path):
    other = tiny.write_llm(tmp_path / "other", seed=1)
    with FakeVllm(root / "ltu_llm") as right, FakeVllm(other) as wrong:
        there = connect(right)
        there.hosts.hosts.append(VllmHost(wrong.url))
        answers = there(mixture()[:3], **DECODING)
    assert [answer.status for answer in answers] == ["ok"] * 3 and wrong.bodies == []


def test_a_wrong_key_is_refused(root, connect, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with FakeVllm(root / "ltu_llm", key=KEY) as server:
        with pytest.raises(ValueError, match=r"status 401: Unauthorized: Bearer \*\*\*$"):
            connect(server)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://h:x/v1", "http://me:pw@h/v1"]
)
def test_impossible_addresses(url):
    with pytest.raises(ValueError, match="--engine_url") as error:
        parse_url(url)
    assert "pw" not in str(error.value).replace("password", "")


# --- cancelled requests


@pytest.mark.parametrize("fault", ["", "hang"])
def test_a_reader_who_leaves_ends_the_request(server, connect, fault):
    there = connect(server)
    server.gate.clear()
    server.script = [fault]
    if fault:
        states = iter([None])
        requests = [Request("What is it?", tiny.clip(0))]

        def on_text(index: int, text: str) -> bool | None:
            return next(states, False)

        answers = list(there.run(requests, on_text=on_text, **DECODING))
        assert [answer.finish_reason for _, answer in answers] == ["cancelled"]
    else:
        stream = there.stream(Request("What is it?", tiny.clip(0)), **DECODING)
        assert next(stream)
        stream.close()
    wait_until(lambda: server.aborted == 1)
    server.gate.set()
    assert there([Request("Why?")], **DECODING)[0].status == "ok"


def test_a_run_that_is_left_ends_its_requests(server, connect):
    there = connect(server)
    run = there.run(mixture()[:5], 4, **DECODING)
    next(run)
    server.gate.clear()
    run.close()
    gc.collect()
    wait_until(lambda: server.at_once == 0)
    assert len(server.bodies) < 5 or server.aborted


# --- commands


def test_inference_batch(root, server, tmp_path, capsys):
    questions = tiny.write_rows(tmp_path / "data", 6, without_audio=1)
    flags = ["--model", str(root / "ltu"), "--device", "cpu", "--max_new_tokens", "6"]
    flags += ["--data_path", str(questions)]
    assert answer_questions([*flags, "--output_path", str(tmp_path / "here.json")]) == 0
    flags += ["--engine", "vllm", "--engine_url", server.url]
    assert answer_questions([*flags, "--output_path", str(tmp_path / "there.json")]) == 0
    here, there = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("here", "there")
    )
    for prediction in here + there:
        del prediction["seconds"]
    assert there == here and len(server.bodies) == 6


def test_flags_that_contradict_each_other(root, server, tmp_path):
    questions = str(tiny.write_rows(tmp_path / "data", 2))
    flags = ["--model", str(root / "ltu"), "--data_path", questions, "--device", "cpu"]
    flags += ["--output_path", str(tmp_path / "p.json")]
    vllm = ["--engine", "vllm", "--engine_url", server.url]
    for more, message in (
        (["--engine", "vllm"], "needs --engine_url"),
        (["--engine", "vllm", "--engine_url", "host:8000"], "'host:8000': an address"),
        (["--engine_url", server.url], "without --engine vllm"),
        ([*vllm, "--quantization", "4bit", "--compile"], "--quantization and --compile"),
        ([*vllm, "--original_decoding"], "repetition_penalty is 1.1"),
        ([*vllm, "--num_beams", "2"], "num_beams"),
        (["--engine", "vllm", "--engine_url", unused_url()], "No server of --engine_url answers"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            answer_questions([*flags, *more])
    with pytest.raises(SystemExit):
        answer_questions([*flags[:4], "--check_batch", *vllm])
    with pytest.raises(ValueError, match="num_beams|needs --engine_url"):
        serve_command(["--model", str(root / "ltu"), "--port", "0", "--engine", "vllm"])
    assert parse_urls("http://a/v1, http://b/v1,") == ["http://a/v1", "http://b/v1"]


def test_served_requests_do_not_wait_for_each_other(server, connect, local):
    there = connect(server)
    server.gate.clear()
    with serve(there, "--max_batch", "3") as served, ThreadPoolExecutor(5) as pool:
        pending = []
        for number in range(5):
            part = {"type": "text", "text": f"Why {number}?"}
            pending.append(pool.submit(served.ask, part))
            # It begins although the ones before it have not ended, as many as there may be.
            wait_until(lambda: server.at_once == min(len(pending), 3))
        server.gate.set()
        texts = [future.result(PATIENCE).choices[0].message.content for future in pending]
        assert server.most_at_once == 3
    expected = local([Request(f"Why {i}?") for i in range(5)], **DECODING)
    assert texts == [answer.text for answer in expected]


def test_served_errors(server, connect, monkeypatch):
    monkeypatch.setattr("ltu.inference.vllm_client.FIRST_PAUSE", 0.001)
    there = connect(server)
    part = {"type": "text", "text": "Why?"}
    with serve(there) as served:
        with pytest.raises(openai.BadRequestError, match="repetition_penalty"):
            served.ask(part, extra_body={"repetition_penalty": 1.2})
        server.script = ["429 0"] * 4
        with pytest.raises(openai.InternalServerError) as error:
            served.ask(part)
        assert error.value.status_code == 503 and error.value.code == "engine_busy"
        assert error.value.response.headers["retry-after"] == "1"
        server.script = ["500"] * 4
        with pytest.raises(openai.InternalServerError) as error:
            served.ask(part)
        assert error.value.status_code == 502 and server.url not in str(error.value)
        assert served.metric('ltu_answers_total{status="engine_failed"}') == 1
        assert served.ask(part).choices[0].message.content


def test_a_client_that_disconnects_ends_the_request(server, connect):
    server.gate.clear()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}]}
    with serve(connect(server)) as served:
        connection = served.send(json.dumps(body).encode())
        wait_until(lambda: server.at_once == 1)
        connection.close()
        wait_until(lambda: server.aborted == 1)
