"""Embeds texts with a local sentence model, an OpenAI-compatible endpoint, or a table.

    embed = open_embedder("minilm", "exp/eval_cache")
    embeddings = embed(["sound of rain", "sound of a dog"])  # (2, 384) float64

"minilm" is all-MiniLM-L6-v2; `python -m train_scripts.quickstart.download_pretrained --also minilm`
downloads it. Each embedding is on the disk, under its model and text, before the next batch begins:
kill -9 loses only the batch in flight.

Local batches have the same shape for all texts of similar length, so an embedding depends on its
text alone, to the last bit, whether it comes from the cache, from another batch or from a batch of
one. Embeddings are cached in the precision in which they arrive: float32 from a local model,
float64 from the decimal numbers of an endpoint.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from eval.scorer_interface import USABLE_SIZES, EvaluationError, has_usable_size
from ltu.files import sha256_of
from qa_generation.llm import LlmSettings, OpenAiEndpoint, UnreadableReply

MINILM = Path(__file__).parent.parent / "pretrained_mdls" / "minilm"
UNUSABLE = (
    "is all zeros or not a number, or its largest number is outside "
    f"{USABLE_SIZES[0]:g} to {USABLE_SIZES[1]:g}, so it has no exact norm. Fix or scale it."
)
BATCH_SIZE = 32  # texts of a local batch, which is filled up if there are fewer
LENGTH_STEP = 16  # tokens; a batch is as long as the next multiple
TEXTS_PER_REQUEST = 256  # OpenAI takes 2,048 and 300,000 tokens
MAX_BYTES_PER_TEXT = 2**17  # of a reply: more than 5,000 numbers of 25 digits each

# Maps distinct texts to batches of some of them and their embeddings, (texts, dim).
Encode = Callable[[list[str]], Iterable[tuple[list[str], np.ndarray]]]


class Embedder:
    """Embeds texts and caches their embeddings.

    Args:
        name: States everything that decides an embedding; embeddings are cached under it.
        encode: Maps distinct texts to the embeddings of all of them.
        cache_dir: Folder of the cache. If None, the cache lives as long as this object.
    """

    def __init__(self, name: str, encode: Encode, cache_dir: str | Path | None = None):
        self.name = name
        self.encode = encode
        path: str | Path = ":memory:"
        if cache_dir:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
            path = Path(cache_dir, "embeddings.sqlite3")
        self.cache = sqlite3.connect(path, timeout=60)  # seconds; another run may be writing
        columns = "model TEXT, text TEXT, dtype TEXT, vector BLOB, PRIMARY KEY (model, text)"
        try:
            self.cache.execute(f"CREATE TABLE IF NOT EXISTS vectors ({columns}) WITHOUT ROWID")
        except sqlite3.DatabaseError as error:
            raise EvaluationError(
                f"{path}: {error}. Remove it, or name another folder for the cache."
            ) from None

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return the embeddings of texts, (n, dim) float64.

        Raises:
            EvaluationError: A text has no embedding, or one without a usable norm.
        """
        # Replace half an emoji, which no tokenizer takes.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        distinct = list(dict.fromkeys(texts))
        embeddings = self._read_cache(distinct)
        todo = [text for text in distinct if text not in embeddings]
        # Show no progress bar if there is nothing to do.
        disable = None if todo else True
        with tqdm(desc="embedding", total=len(todo), unit="text", disable=disable) as bar:
            if todo:
                for batch, made in self.encode(todo):
                    self._write_cache(batch, made)
                    embeddings.update(zip(batch, made, strict=True))
                    bar.update(len(batch))
        if not texts:
            return np.zeros((0, 0))
        found = np.array([embeddings[text] for text in texts], dtype=np.float64)
        is_usable = has_usable_size(found)
        if not is_usable.all():
            text = texts[int(is_usable.argmin())]
            raise EvaluationError(f"{self.name}: the embedding of {text!r} {UNUSABLE}")
        return found

    def _read_cache(self, texts: list[str]) -> dict[str, np.ndarray]:
        embeddings = {}
        select = "SELECT dtype, vector FROM vectors WHERE model = ? AND text = ?"
        for text in texts:
            found = self.cache.execute(select, (self.name, text)).fetchone()
            if found:
                dtype, content = found
                embeddings[text] = np.frombuffer(content, dtype)
        return embeddings

    def _write_cache(self, texts: list[str], embeddings: np.ndarray) -> None:
        rows = []
        for text, embedding in zip(texts, embeddings, strict=True):
            rows.append((self.name, text, embedding.dtype.str, embedding.tobytes()))
        insert = "INSERT OR IGNORE INTO vectors VALUES (?, ?, ?, ?)"
        with self.cache:  # One transaction, which is on the disk when it ends.
            self.cache.executemany(insert, rows)


def open_embedder(name: str, cache_dir: str | Path | None = None) -> Embedder:
    """Open a sentence model, an endpoint or a table of embeddings.

    Args:
        name: "minilm", "openai:MODEL" (endpoint and key from OPENAI_BASE_URL and OPENAI_API_KEY), a
            folder in the format of sentence-transformers, or a table: JSON {text: embedding}, or
            .npz with `texts` and `vectors`.
        cache_dir: Folder of the cache. A table is not copied into it.

    Raises:
        EvaluationError: The name is none of these, or cannot be used.
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
    hint = "a folder, a table, openai:MODEL"
    if name == "minilm":
        hint = "python -m train_scripts.quickstart.download_pretrained --also minilm"
    raise EvaluationError(f"{path} is not there: {hint}")


def _table(path: Path) -> Encode:
    """Return a function that looks embeddings up in a table."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                texts = arrays["texts"].tolist()
                rows = arrays["vectors"]
        else:
            texts, rows = zip(*json.loads(path.read_text(encoding="utf-8")).items(), strict=True)
        embeddings = np.array(rows, dtype=np.float64).reshape(len(texts), -1)
        table = dict(zip(texts, embeddings, strict=True))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{path}: no table of embeddings of one length ({error}).") from None
    is_usable = has_usable_size(embeddings)
    if not is_usable.all():
        row = int(is_usable.argmin())
        raise EvaluationError(f"{path}, row {row + 1}: the embedding of {texts[row]!r} {UNUSABLE}")

    def look_up(texts: list[str]) -> Iterable[tuple[list[str], np.ndarray]]:
        missing = [text for text in texts if text not in table]
        if missing:
            raise EvaluationError(
                f"{path} lacks embeddings of {len(missing)} texts, the first: {missing[0]!r}."
            )
        yield texts, np.array([table[text] for text in texts])

    return look_up


class SentenceModel:
    """A folder in the format of sentence-transformers, opened with transformers alone.

    Raises:
        EvaluationError: It has other modules than a Transformer, a Pooling (mean or cls) and,
            optionally, a Normalize.
    """

    def __init__(self, folder: Path):
        modules = _read(folder / "modules.json") or [{"type": "nothing"}]
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise EvaluationError(
                f"{folder}/modules.json: {kinds}; "
                "only Transformer, Pooling and Normalize are supported."
            )
        source = folder / modules[0]["path"]
        settings = _read(source / "sentence_bert_config.json")
        self.pooling = _pooling_mode(_read(folder / modules[1]["path"] / "config.json"))
        prompt = _read(folder / "config_sentence_transformers.json").get("default_prompt_name")
        lower_case = settings.get("do_lower_case", False)
        if self.pooling not in ("mean", "cls") or prompt or lower_case:
            raise EvaluationError(
                f"{folder}: pooling {self.pooling!r}, prompt {prompt!r}, lower case {lower_case}; "
                "only mean and cls, without a prompt, are supported."
            )
        self.is_normalized = "Normalize" in kinds
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".md":
                digest.update(sha256_of(path).encode())
        self.sha256 = digest.hexdigest()
        self.tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=True, padding_side="right"
        )
        model = AutoModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device).eval()
        longest = min(self.tokenizer.model_max_length, model.config.max_position_embeddings)
        self.max_length = settings.get("max_seq_length") or longest

    def __call__(self, texts: list[str]) -> Iterable[tuple[list[str], np.ndarray]]:
        """Yield batches of texts of similar length and their embeddings."""
        tokens = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        by_length: dict[int, list[tuple[str, list[int]]]] = {}
        for text, own_tokens in zip(texts, tokens, strict=True):
            length = self._padded_length(len(own_tokens))
            by_length.setdefault(length, []).append((text, own_tokens))
        for length, group in sorted(by_length.items()):
            for start in range(0, len(group), BATCH_SIZE):
                batch_texts, batch_tokens = zip(*group[start : start + BATCH_SIZE], strict=True)
                yield list(batch_texts), self._encode(list(batch_tokens), length)

    def _padded_length(self, count: int) -> int:
        """Round a number of tokens up to a multiple of LENGTH_STEP."""
        return min(-(-count // LENGTH_STEP) * LENGTH_STEP, self.max_length)

    def _encode(self, tokens: list[list[int]], length: int) -> np.ndarray:
        """Return the embeddings (texts, dim) of at most BATCH_SIZE texts."""
        # Fill the batch up with copies of its first text.
        filled = tokens + tokens[:1] * (BATCH_SIZE - len(tokens))
        inputs = self.tokenizer.pad(
            {"input_ids": filled}, padding="max_length", max_length=length, return_tensors="pt"
        )
        with torch.inference_mode():
            output = self.model(**inputs.to(self.model.device))
            hidden = output.last_hidden_state  # (BATCH_SIZE, length, dim)
            mask = inputs["attention_mask"].to(hidden.device)[..., None]  # (BATCH_SIZE, length, 1)
            if self.pooling == "cls":
                embeddings = hidden[:, 0]  # (BATCH_SIZE, dim)
            else:
                embeddings = (hidden * mask).sum(1) / mask.sum(1)  # (BATCH_SIZE, dim)
            if self.is_normalized:
                embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
        return embeddings[: len(tokens)].cpu().numpy()


def _read(path: Path) -> Any:
    """Return the content of a JSON file, {} if there is none.

    Raises:
        EvaluationError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is damaged ({error}). Copy it again.") from error


def _pooling_mode(config: dict[str, Any]) -> str:
    """Return the pooling of a configuration, which newer versions name with one key."""
    enabled = []
    for key, value in config.items():
        if key.startswith("pooling_mode_") and value is True:
            enabled.append(key.split("_")[2])
    return config.get("pooling_mode", "+".join(enabled))


class EmbeddingApi(OpenAiEndpoint):
    """Requests embeddings from the endpoint, and with the key, of `qa_generation.llm`."""

    def __init__(self, model: str):
        try:
            super().__init__(LlmSettings(model))
        except ValueError as error:
            raise EvaluationError(str(error)) from None

    def __call__(self, texts: list[str]) -> Iterable[tuple[list[str], np.ndarray]]:
        """Yield batches of texts and their embeddings.

        The client itself waits and retries: 408, 409, 429, 5xx, time-outs, lost connections.
        """
        with self.open_sync_client(TEXTS_PER_REQUEST * MAX_BYTES_PER_TEXT) as client:
            for start in range(0, len(texts), TEXTS_PER_REQUEST):
                batch = texts[start : start + TEXTS_PER_REQUEST]
                yield batch, self._request(client, batch)

    def _request(self, client: Any, batch: list[str]) -> np.ndarray:
        """Return the embeddings (texts, dim) of one request."""
        request = {
            "model": self.settings.model,
            "input": [text or " " for text in batch],  # OpenAI refuses an empty text.
            "encoding_format": "float",
        }
        url = self.settings.record()["base_url"]
        try:
            body = client.embeddings.with_raw_response.create(**request).http_response.text
            parts = sorted(json.loads(body)["data"], key=lambda part: part["index"])
            embeddings = np.array([part["embedding"] for part in parts], dtype=np.float64)
            has_all = embeddings.ndim == 2 and len(embeddings) == len(batch)
            if has_all and np.isfinite(embeddings).all():
                return embeddings
            reason = f"{embeddings.shape} numbers for {len(batch)} texts, or some are not finite"
        except (self.openai.APIError, UnreadableReply) as error:
            reason = self.explain(error)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no list of embeddings ({self.clean(repr(error))})"
        raise EvaluationError(
            f"{url}: {reason}; first of the texts: {batch[0]!r}. "
            "Run it again: embeddings received so far are cached."
        )
