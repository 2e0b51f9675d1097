"""Tests of what clients of OpenAI's API send in practice, and of the errors for everything else."""

import base64
import copy
import inspect
import io
import json
import re
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

import openai
import pytest
import soundfile
from openai.resources.chat.completions import Completions

from ltu.inference.engine import LtuEngine
from ltu.models.prompt_template import load_prompt_template
from ltu.serve import read_flags
from ltu.serving import protocol, request_parser
from ltu.serving.request_parser import ApiError, PendingRequest, RequestParser
from tests import tiny
from tests.test_any_llm import byte_tokenizer
from tests.test_serve import QUESTION, Served, audio_part, encode_clip, serve, text_part, user

# The last byte is no part of the sound. With it, base64 has padding.
CLIP = encode_clip(tiny.clip(1)) + b"\0"
BASE64 = base64.b64encode(CLIP).decode()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LtuEngine:
    """Return an engine whose prompt template takes several turns."""
    root = tmp_path_factory.mktemp("parts")
    llm = tiny.write_llm(
        root / "llm", tokenizer=byte_tokenizer(), bos_token_id=None, eos_token_id=0
    )
    template = load_prompt_template("chat", llm)
    return LtuEngine.from_pretrained(
        tiny.write_checkpoint(root / "tiny", llm, prompt_template=template)
    )


@pytest.fixture(scope="module")
def parser(engine: LtuEngine) -> RequestParser:
    return RequestParser(engine.processor, read_flags(["--model", "tiny"]), "tiny")


@pytest.fixture(scope="module")
def served(engine: LtuEngine) -> Iterator[Served]:
    with serve(engine) as running:
        yield running


def parse(parser: RequestParser, **fields: Any) -> PendingRequest:
    """Parse a body with fields on top of those that it must have."""
    body = {"model": "tiny", "messages": user(QUESTION)} | fields
    return parser.parse(bytearray(json.dumps(body).encode()))


def refusal(parser: RequestParser, **fields: Any) -> str:
    """Return the message of the error for a body."""
    with pytest.raises(ApiError) as error:
        parse(parser, **fields)
    assert error.value.status_code == 400
    return error.value.detail["message"]


def input_audio(**fields: Any) -> dict:
    return {"type": "input_audio", "input_audio": fields}


def audio_url(url: Any) -> dict:
    return {"type": "audio_url", "audio_url": url}


# --- what is taken


def in_lines(text: str, width: int = 76) -> str:
    return "\r\n".join(text[start : start + width] for start in range(0, len(text), width))


URL_SAFE = base64.urlsafe_b64encode(CLIP).decode()
CLIP_PARTS = {
    "format in capitals": input_audio(data=BASE64, format="WAV"),
    "another format": input_audio(data=BASE64, format="Mp3"),
    "a media type": input_audio(data=BASE64, format="audio/wav"),
    "no format": input_audio(data=BASE64),
    "lines": input_audio(data=in_lines(BASE64) + "\n", format="wav"),
    "white space": input_audio(data=" \t" + BASE64.replace("A", "A "), format="wav"),
    "no padding": input_audio(data=BASE64.rstrip("="), format="wav"),
    "URL-safe": input_audio(data=URL_SAFE, format="wav"),
    "data URL": input_audio(data=f"data:audio/wav;base64,{BASE64}", format="wav"),
    "without a type": input_audio(data=f"data:;base64,{BASE64}", format="wav"),
    "parameters": input_audio(data=f"Data:audio/ogg;codecs=opus;Base64,{BASE64}", format="wav"),
    "percent": input_audio(data=f"data:audio/wav;base64,{BASE64.replace('=', '%3D')}"),
    "percent, all characters": input_audio(
        data="data:;base64," + quote(in_lines(BASE64), safe=""), format="wav"
    ),
    "percent in lower case": input_audio(
        data="data:;base64," + BASE64.replace("+", "%2b").replace("=", "%3d"), format="wav"
    ),
    "audio_url": audio_url({"url": f"data:audio/wav;base64,{in_lines(BASE64)}", "detail": "x"}),
    "audio_url as a text": audio_url(f"data:audio/x-wav;base64,{BASE64}"),
    "extra keys": {
        "type": "input_audio",
        "input_audio": {"data": BASE64, "format": "wav", "type": "base64", "uuid": "1"},
        "cache_control": {"type": "ephemeral"},
    },
}


def test_the_clip_of_the_tests_has_all_characters() -> None:
    assert BASE64.endswith("=") and {"+", "/"} <= set(BASE64)
    assert {"-", "_"} <= set(URL_SAFE)


@pytest.mark.parametrize("name", CLIP_PARTS)
def test_a_clip_is_taken(name: str, parser: RequestParser) -> None:
    pending = parse(parser, messages=user([text_part(), CLIP_PARTS[name]]))
    assert pending.encoded_clip == CLIP and pending.request.audio is None
    parser.decode(pending)
    assert len(pending.request.audio.waveform) == len(tiny.clip(1))
    assert pending.encoded_clip is None


@pytest.mark.parametrize(
    ("kind", "subtype"), [("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", None), ("aiff", None)]
)
def test_the_file_says_its_format(served: Served, kind: str, subtype: str | None) -> None:
    """Whatever `format` is, a file that libsndfile decodes is answered, by OpenAI's client."""
    file = io.BytesIO()
    soundfile.write(file, tiny.clip(1), 16_000, format=kind, subtype=subtype)
    data = file.getvalue()
    expected = served.answer_alone(QUESTION, data)
    for name in (kind, kind.upper(), "opus", "m4a"):
        reply = served.ask(text_part(), audio_part(data, name))
        assert reply.choices[0].message.content == expected
        assert reply.model_extra["ltu"]["status"] == "ok"
    with pytest.raises(openai.BadRequestError) as error:
        served.ask(text_part(), audio_part(b"no sound at all", kind))
    assert error.value.code == "unreadable"


def test_turns_as_clients_send_them(served: Served) -> None:
    """`developer` and null content, names, refusals and annotations, texts as lists of parts."""
    ephemeral = {"cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [text_part("What is it?") | ephemeral]} | ephemeral,
        {
            "role": "assistant",
            "content": "A dog.",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"role": "user", "content": "Loud?", "name": "me"},
        {"role": "assistant", "content": None, "refusal": "I cannot say."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [text_part("And now?"), audio_part(CLIP)]},
    ]
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Loud?"},
        {"role": "assistant", "content": "I cannot say."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": ""},
    ]
    expected = served.answer_alone("And now?", CLIP, history=history)
    assert served.ask(messages=turns).choices[0].message.content == expected


# Each parameter of OpenAI's client, with a value that changes no answer and one that would.
# `None` instead of a value: there is none.
CLIENT_PARAMETERS: dict[str, tuple[Any, Any]] = {
    "messages": (user(QUESTION), 5),
    "model": ("tiny", 5),
    "audio": ({"voice": "alloy", "format": "wav"}, None),
    "frequency_penalty": (0, 0.5),
    "function_call": ("auto", {"name": "f"}),
    "functions": ([], [{"name": "f"}]),
    "logit_bias": ({}, {"5": 1}),
    "logprobs": (False, True),
    "max_completion_tokens": (12, 0),
    "max_tokens": (12, "12"),
    "metadata": ({"a": "b"}, None),
    "modalities": (["text"], ["text", "audio"]),
    "moderation": (None, {"model": "x"}),
    "n": (1, 2),
    "parallel_tool_calls": (True, None),
    "prediction": ({"type": "content", "content": "x"}, None),
    "presence_penalty": (0.0, -1),
    "prompt_cache_key": ("x", None),
    "prompt_cache_options": ({"mode": "x"}, None),
    "prompt_cache_retention": ("24h", None),
    "reasoning_effort": ("low", None),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
    "safety_identifier": ("x", None),
    "seed": (5, "x"),
    "service_tier": ("auto", None),
    "stop": (["\ud7ff never"], 5),
    "store": (False, None),
    "stream": (False, "yes"),
    "stream_options": ({"include_usage": True, "include_obfuscation": False}, "x"),
    "temperature": (0, "hot"),
    "tool_choice": ("auto", "required"),
    "tools": ([], [{"type": "function", "function": {"name": "f"}}]),
    "top_logprobs": (0, 3),
    "top_p": (1, "x"),
    "user": ("x", None),
    "verbosity": ("low", None),
    "web_search_options": (None, {}),
}
OF_THE_TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


def test_all_parameters_of_the_client_are_tested() -> None:
    """Clients older than that of the tests have fewer parameters."""
    parameters = set(inspect.signature(Completions.create).parameters)
    assert parameters - OF_THE_TRANSPORT <= set(CLIENT_PARAMETERS)


@pytest.mark.parametrize("name", CLIENT_PARAMETERS)
def test_a_parameter_of_the_client(name: str, parser: RequestParser) -> None:
    """One that changes no answer is taken, null is no value, and all else is one line about it."""
    harmless, harmful = CLIENT_PARAMETERS[name]
    if harmless is not None:
        given = parse(parser, **{name: harmless})
        assert given.request.question == QUESTION
        assert given.request.decoding["max_new_tokens"] in (12, 400)
        assert not given.request.decoding["do_sample"]
    if name not in ("messages", "model"):
        assert parse(parser, **{name: None}).request.question == QUESTION
    if harmful is not None:
        message = refusal(parser, **{name: harmful})
        assert name in message and "\n" not in message and len(message) < 500


def test_a_request_with_all_harmless_parameters(served: Served) -> None:
    """OpenAI's client sends them all at once."""
    harmless = {
        name: value
        for name, (value, _) in CLIENT_PARAMETERS.items()
        if value is not None and name not in ("messages", "model", "max_tokens")
    }
    client_parameters = inspect.signature(Completions.create).parameters
    unknown = {name: value for name, value in harmless.items() if name not in client_parameters}
    known = {name: value for name, value in harmless.items() if name in client_parameters}
    reply = served.client.chat.completions.create(
        model="tiny", messages=user(QUESTION), extra_body=unknown, **known
    )
    assert reply.choices[0].message.content == served.answer_alone(QUESTION)


# --- what is refused, and how

ADDRESSES = (
    "http://127.0.0.1:9/a.wav",
    "https://example.com/a.wav",
    "HTTPS://example.com/a.wav",
    "file:///etc/passwd",
    "ftp://example.com/a.wav",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_is_fetched(address: str, parser: RequestParser) -> None:
    for part in (audio_url({"url": address}), audio_url(address), input_audio(data=address)):
        message = refusal(parser, messages=user([text_part(), part]))
        assert "nothing is fetched" in message and part["type"] in message


@pytest.mark.parametrize(
    "data", ["?not base64?", "Aé==", "AAAAA", "data:audio/wav,AAAA", "data:audio/wav;base64,*"]
)
def test_what_is_not_base64(data: str, parser: RequestParser) -> None:
    message = refusal(parser, messages=user([text_part(), input_audio(data=data)]))
    assert "base64" in message and "input_audio.data" in message
    assert "data: URL" in refusal(parser, messages=user([text_part(), audio_url("/etc/passwd")]))


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "audio"])
def test_an_answer_that_is_no_text_is_refused(key: str, parser: RequestParser) -> None:
    value = [{"id": "1"}] if key == "tool_calls" else {"id": "1"}
    turns = [*user("Hm?"), {"role": "assistant", "content": None, key: value}, *user("So?")]
    assert f"messages.1.{key} is not supported" in refusal(parser, messages=turns)


def test_the_message_about_a_part_names_its_keys(parser: RequestParser) -> None:
    """Its path has the keys of the request and no other."""
    for part, beginning in (
        ({"type": "text", "text": 5}, "messages.0.content.0.text is 5: "),
        ({"type": "text"}, "messages.0.content.0.text is missing."),
        (input_audio(format="wav"), "messages.0.content.0.input_audio.data is missing."),
        (input_audio(data=BASE64, format=5), "messages.0.content.0.input_audio.format is 5: "),
        ({"type": "x"}, "messages.0.content.0 is an object: its type is 'x', not 'text'"),
        ({"type": None}, "messages.0.content.0 is an object: its type is null, not 'text'"),
        ({"text": "x"}, "messages.0.content.0 is an object: it has no type."),
    ):
        assert refusal(parser, messages=user([part])).startswith(beginning)


LIMIT = 100_000 + request_parser.MAX_SEPARATORS


@pytest.mark.parametrize("content", [",".join(["{}"] * LIMIT), "[" * LIMIT, '{"a":' * LIMIT])
def test_a_body_of_very_many_values_is_not_parsed(
    parser: RequestParser, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """Parsing them takes memory and time that a limit of bytes does not bound."""
    monkeypatch.setattr(request_parser, "ChatCompletionRequest", None)  # It would be used.
    body = f'{{"model": "tiny", "messages": [{content}'
    with pytest.raises(ApiError, match="commas, lists and objects. At most 110,000 are"):
        parser.parse(bytearray(body.encode()))


def test_an_error_quotes_the_first_of_many_turns(parser: RequestParser) -> None:
    turns = [{"role": "assistant", "content": "x"}] * 3000
    clips = user([audio_part(CLIP)] * 300)
    for messages in (turns, clips):
        with pytest.raises(ValueError, match="more") as error:
            parse(parser, messages=messages)
        assert len(str(error.value)) < 1000


def test_the_longest_text_may_consist_of_commas(parser: RequestParser) -> None:
    text = "," * 99_000
    assert parse(parser, messages=user(text)).request.question == text


def test_a_clip_of_escapes_is_refused_within_little_memory(parser: RequestParser) -> None:
    """An object for each escape would take a hundred times as much memory as the body."""
    clip = "data:audio/wav;base64," + "%41" * 500_000
    tracemalloc.start()
    try:
        with pytest.raises(ApiError, match="is not in base64"):
            request_parser.read_clip(clip, "input_audio.data")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(clip)


def deep(depth: int, key: str | None) -> Any:
    """Return a list in a list in a list ..., or an object in an object."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


ODD_VALUES = [
    *(None, True, False, 0, -1, 0.5, 2**31, 10**30, "", "x", "data:", "http://x.example/a.wav"),
    *([], [[]], [None], [5], ["x"], [{}], {}, {"a": None}, {"type": None}, {"type": "text"}),
    *({"type": ["x"]}, {"type": {"a": None}}, {"role": "assistant"}, deep(150, None)),
    *(deep(150, "a"), deep(500, None), {str(number): None for number in range(200)}),
    *({str(number): 1 for number in range(200)}, [0] * 1000, "x" * 10_000, [True], [False]),
]
FULL_BODY = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [text_part("x"), input_audio(data=BASE64, format="wav")]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}], "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "x"},
    ],
    "audio": {},
    "stop": ["x"],
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "repetition_penalty": 1.5,
    "transcript": "x",
    "mode": "joint",
    "num_chunks": 1,
    "seed": 5,
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "stream": False,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
    "n": 1,
    "tools": [],
    "functions": [],
    "function_call": "none",
    "tool_choice": "none",
    "modalities": ["text"],
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "user": "x",
}
# The names of all that is defined in the parser and the protocol, without words of the API.
OUR_NAMES = {
    name
    for module in (protocol, request_parser)
    for name in vars(module)
    if name.lower() != name and not name.isupper() or "_" in name
}
# Words of Python and pydantic that tell a client nothing.
FOREIGN_WORDS = (
    r"unexpected keyword|NoneType|\bNone\b|\bTrue\b|\bFalse\b|object is not|has no attribute|__"
    r"|validat|Value error|discriminator|\btag\b|\bDictionary\b|\bdict\b|\bstr\b|\btuple\b"
    r"|instance of|Traceback|pydantic|codec|recursion depth|\bEnum\b|argument"
)
INTERNAL = re.compile(rf"{FOREIGN_WORDS}|\b({'|'.join(map(re.escape, sorted(OUR_NAMES)))})\b")


def variants(value: Any) -> Iterator[Any]:
    """Yield a JSON value with each of its nodes replaced, removed or given another key."""
    yield from ODD_VALUES
    if isinstance(value, dict):
        yield value | {"odd key": 1}
        yield value | {"odd key": {"another": [None]}}
        keys: Iterable = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    else:
        return
    for key in keys:
        changed = copy.copy(value)
        del changed[key]
        yield changed
        for variant in variants(value[key]):
            changed = copy.copy(value)
            changed[key] = variant
            yield changed


def test_no_message_has_an_internal_name(parser: RequestParser) -> None:
    """Replace, remove and add every node of a body that has all fields."""
    assert INTERNAL.search("read_clip() got an unexpected keyword argument")
    parser.parse(bytearray(json.dumps(FULL_BODY).encode()))
    num_refused = 0
    for body in variants(FULL_BODY):
        try:
            parser.decode(parser.parse(bytearray(json.dumps(body).encode())))
        except ApiError as error:
            message = error.detail["message"]
        except ValueError as error:  # The server makes it an ApiError too.
            message = str(error)
        else:
            continue
        num_refused += 1
        assert not INTERNAL.search(message), (message, str(body)[:500])
        assert "\n" not in message and 0 < len(message) < 1000
    assert num_refused > 500
