"""Texts -> vectors: a local sentence model, an OpenAI-compatible endpoint, or a table of ready vectors.

    embed = open_embedder("minilm", "exp/eval_cache")  # all-MiniLM-L6-v2: train_scripts.fetch_parts --also minilm
    vectors = embed(["sound of rain", "sound of a dog"])  # (2, 384) float64

Notable:
- A vector is on the disk, by model and text, before the next batch is begun: kill -9 loses the batch on its way.
- Local batches have one shape for all texts of like length, so a vector depends on its text alone, to the last bit,
  whether it comes from the cache, another batch, or alone.
- Vectors are kept as they came: float32 of a local model, float64 of an endpoint's decimal numbers.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.score_result import EvaluationError
from ltu.files import sha256_of
from qa_generation.llm import LlmSettings, OpenAiEndpoint

MINILM = Path(__file__).parent.parent / "pretrained_mdls" / "minilm"
ROWS = 32  # of a local batch, filled up if there are fewer
LENGTH_STEP = 16  # tokens; a batch is as long as the next multiple
TEXTS_PER_REQUEST = 256  # OpenAI takes 2,048 and 300,000 tokens

Encode = Callable[
    [list[str]], Iterable[tuple[list[str], np.ndarray]]
]  # texts -> some of them, (texts, dim)


class Embedder:
    """Args:
    name: says all that decides a vector; vectors are cached under it.
    encode: texts, none of them twice -> all their vectors.
    cache_dir: folder of the cache; None: only while this object lives.
    """

    def __init__(self, name: str, encode: Encode, cache_dir: str | Path | None = None):
        self.name, self.encode = name, encode
        if cache_dir:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        path = Path(cache_dir, "embeddings.sqlite3") if cache_dir else ":memory:"
        self.cache = sqlite3.connect(path, timeout=60)  # seconds; another run may be writing
        columns = "model TEXT, text TEXT, dtype TEXT, vector BLOB, PRIMARY KEY (model, text)"
        try:
            self.cache.execute(f"CREATE TABLE IF NOT EXISTS vectors ({columns}) WITHOUT ROWID")
        except sqlite3.DatabaseError as error:
            raise EvaluationError(
                f"{path}: {error}. Remove it, or name another folder for the cache."
            ) from None

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n, dim) float64. Raises EvaluationError: one has no vector."""
        texts = [
            text.encode("utf-8", "replace").decode() for text in texts
        ]  # No tokenizer takes half an emoji.
        vectors: dict[str, np.ndarray] = {}
        for text in dict.fromkeys(texts):
            select = "SELECT dtype, vector FROM vectors WHERE model = ? AND text = ?"
            if found := self.cache.execute(select, (self.name, text)).fetchone():
                vectors[text] = np.frombuffer(found[1], found[0])
        todo = [text for text in dict.fromkeys(texts) if text not in vectors]
        with tqdm(
            desc="embedding", total=len(todo), unit="text", disable=None if todo else True
        ) as bar:
            for batch, made in self.encode(todo) if todo else ():
                rows = [
                    (self.name, text, row.dtype.str, row.tobytes())
                    for text, row in zip(batch, made, strict=True)
                ]
                with self.cache:  # One transaction, on the disk when it ends.
                    self.cache.executemany(
                        "INSERT OR IGNORE INTO vectors VALUES (?, ?, ?, ?)", rows
                    )
                vectors.update(zip(batch, made, strict=True))
                bar.update(len(batch))
        return np.array([vectors[text] for text in texts], dtype=np.float64)


def open_embedder(name: str, cache_dir: str | Path | None = None) -> Embedder:
    """Args:
        name: "minilm", "openai:MODEL" (endpoint and key from OPENAI_BASE_URL and OPENAI_API_KEY), a folder in the
            form of sentence-transformers, or a table: JSON {text: vector}, or .npz with `texts` and `vectors`.
        cache_dir: where vectors are kept. A table is not copied there.

    Raises:
        EvaluationError: it is none of these, or cannot be used.
    """
    path = MINILM if name == "minilm" else Path(name)
    if name.startswith("openai:"):
        api = EmbeddingApi(name.removeprefix("openai:"))
        return Embedder(f"{name} at {api.settings.record()['base_url']}", api, cache_dir)
    if path.is_dir():
        model = SentenceModel(path)
        return Embedder(f"{path.name} (sha256 {model.sha256})", model, cache_dir)
    if path.is_file():
        return Embedder(f"{path.name} (sha256 {sha256_of(path)})", _table(path))
    way = (
        "python -m train_scripts.fetch_parts --also minilm"
        if name == "minilm"
        else "a folder, a table, openai:MODEL"
    )
    raise EvaluationError(f"{path} is not there: {way}")


def _table(path: Path) -> Encode:
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                texts, vectors = arrays["texts"].tolist(), arrays["vectors"]
        else:
            texts, vectors = zip(*json.loads(path.read_text(encoding="utf-8")).items(), strict=True)
        table = dict(
            zip(texts, np.array(vectors, dtype=np.float64).reshape(len(texts), -1), strict=True)
        )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(f"{path}: no table of vectors of one length ({error}).") from None

    def look_up(texts: list[str]) -> Iterable[tuple[list[str], np.ndarray]]:
        if missing := [text for text in texts if text not in table]:
            raise EvaluationError(
                f"{path} lacks vectors of {len(missing)} texts, the first: {missing[0]!r}."
            )
        yield texts, np.array([table[text] for text in texts])

    return look_up


class SentenceModel:
    """A folder in the form of sentence-transformers, opened with transformers alone.

    Raises:
        EvaluationError: it has other parts than a Transformer, a Pooling (mean or cls) and, perhaps, a Normalize.
    """

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModel, AutoTokenizer

        modules = _read(folder / "modules.json") or [{"type": "nothing"}]
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise EvaluationError(
                f"{folder}/modules.json: {kinds}; only Transformer, Pooling, Normalize are done."
            )
        pooling = _read(folder / modules[1]["path"] / "config.json")
        named = [
            key.split("_")[2]
            for key in pooling
            if key.startswith("pooling_mode_") and pooling[key] is True
        ]
        self.pooling = pooling.get(
            "pooling_mode", "+".join(named)
        )  # newer versions have the one name
        prompt = _read(folder / "config_sentence_transformers.json").get("default_prompt_name")
        source = folder / modules[0]["path"]
        settings = _read(source / "sentence_bert_config.json")
        if self.pooling not in ("mean", "cls") or prompt or settings.get("do_lower_case"):
            asked = f"pooling {self.pooling!r}, prompt {prompt!r}, lower case {settings.get('do_lower_case', False)}"
            raise EvaluationError(
                f"{folder}: {asked}; only mean and cls, without a prompt, are done here."
            )
        self.is_normalized = "Normalize" in kinds
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"
        )
        self.sha256 = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()
        self.tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=True, padding_side="right"
        )
        model = AutoModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        longest = min(self.tokenizer.model_max_length, model.config.max_position_embeddings)
        self.max_length = settings.get("max_seq_length") or longest

    def __call__(self, texts: list[str]) -> Iterable[tuple[list[str], np.ndarray]]:
        import torch

        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        lengths = [
            min(-(-len(ids) // LENGTH_STEP) * LENGTH_STEP, self.max_length) for ids in tokens
        ]
        for length, group in groupby(
            sorted(range(len(texts)), key=lengths.__getitem__), lengths.__getitem__
        ):
            indices = list(group)
            for batch in (indices[start : start + ROWS] for start in range(0, len(indices), ROWS)):
                filled = {
                    "input_ids": [
                        tokens[index] for index in batch + batch[:1] * (ROWS - len(batch))
                    ]
                }
                inputs = self.tokenizer.pad(
                    filled, padding="max_length", max_length=length, return_tensors="pt"
                )
                with torch.inference_mode():
                    hidden = self.model(
                        **inputs.to(self.model.device)
                    ).last_hidden_state  # (ROWS, length, dim)
                    mask = inputs["attention_mask"].to(hidden.device)[..., None]
                    vectors = (
                        hidden[:, 0]
                        if self.pooling == "cls"
                        else (hidden * mask).sum(1) / mask.sum(1)
                    )
                    if self.is_normalized:
                        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
                yield [texts[index] for index in batch], vectors[: len(batch)].cpu().numpy()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class EmbeddingApi(OpenAiEndpoint):
    """Embeddings, by the endpoint and with the key of `qa_generation.llm`."""

    def __init__(self, model: str):
        try:
            super().__init__(LlmSettings(model))
        except ValueError as error:
            raise EvaluationError(str(error)) from None

    def __call__(self, texts: list[str]) -> Iterable[tuple[list[str], np.ndarray]]:
        # The client waits and tries again by itself: 408, 409, 429, 5xx, time-outs, lost connections.
        given = {
            "base_url": self.settings.url,
            "api_key": self.key or "none",
            "timeout": self.settings.timeout,
        }
        with self.openai.OpenAI(max_retries=self.settings.tries, **given) as client:
            for start in range(0, len(texts), TEXTS_PER_REQUEST):
                batch = texts[start : start + TEXTS_PER_REQUEST]
                yield batch, self._ask(client, batch)

    def _ask(self, client: Any, batch: list[str]) -> np.ndarray:
        texts = [text or " " for text in batch]  # OpenAI refuses an empty one.
        asked = {"model": self.settings.model, "input": texts, "encoding_format": "float"}
        url = self.settings.record()["base_url"]
        try:
            body = client.embeddings.with_raw_response.create(**asked).http_response.text
            parts = sorted(json.loads(body)["data"], key=lambda part: part["index"])
            vectors = np.array([part["embedding"] for part in parts], dtype=np.float64)
            if vectors.ndim == 2 and len(vectors) == len(batch) and np.isfinite(vectors).all():
                return vectors
            reason = f"{vectors.shape} numbers for {len(batch)} texts, or some are not finite"
        except self.openai.APIError as error:
            reason = self._clean(error)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no list of embeddings ({error!r})"
        raise EvaluationError(
            f"{url}: {reason}; first of the texts: {batch[0]!r}. Run it again: what it gave is kept."
        )
