"""Runs a server on 127.0.0.1 that takes completion requests as vLLM documents them.

It has a stock language model, which generates from `prompt_embeds` by transformers' own `generate`
with `inputs_embeds`. vLLM itself is not here: the fields are those of `CompletionRequest` in
vllm/entrypoints/openai/completion/protocol.py, and the checks of the embeddings those of
vllm/renderers/embed_utils.py.
"""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import BaseStreamer

# The fields of vLLM's request that mean something here. It ignores unknown ones with a warning;
# this server refuses them.
FIELDS = set(
    "model prompt max_tokens n presence_penalty frequency_penalty repetition_penalty seed stream "
    "temperature top_p top_k min_p stop_token_ids ignore_eos min_tokens prompt_embeds "
    "return_token_ids".split()
)
KEY = "a-secret-key"


class Refused(Exception):
    """A request that vLLM would answer with 400."""


class Disconnected(Exception):
    """The client has closed the connection."""


class EventStreamer(BaseStreamer):
    """Sends each new token as an event. The prompt, which comes first, has no tokens."""

    def __init__(self, send: Callable[[list[int]], None]):
        self.send = send

    def put(self, value: torch.Tensor) -> None:
        self.send(value.flatten().tolist())

    def end(self) -> None:
        """Do nothing: the reason of the end follows."""


class FakeVllm:
    """A context manager; `url` is the address.

    Args:
        folder: of a language model.
        name: of the model for clients; by default its folder.
        max_length: `--max-model-len`.

    Attributes:
        script: faults of the next completions: a status ("429", "503 2" with Retry-After: 2), or
            one of the names in `_stream`.
        bodies: the requests that were answered, parsed.
        aborted: completions whose client closed the connection.
        at_once, most_at_once: completions in progress.
        gate: while it is cleared, completions wait after their first token.
    """

    def __init__(self, folder: Path, name: str = "", max_length: int | None = None, key: str = ""):
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        self.name = name or str(folder)
        self.root = str(folder)
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.key = key
        self.script: list[str] = []
        self.bodies: list[dict] = []
        self.aborted = 0
        self.at_once = 0
        self.most_at_once = 0
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeVllm":
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.list_models(self)

            def do_POST(self) -> None:
                owner.complete(self)

            def log_message(self, *args: Any) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    # --- replies

    def reply(
        self, http: BaseHTTPRequestHandler, status: int, content: Any, wait: str = ""
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(data)))
        if wait:
            http.send_header("Retry-After", wait)
        http.end_headers()
        http.wfile.write(data)

    def error(self, http: BaseHTTPRequestHandler, status: int, text: str, wait: str = "") -> None:
        self.reply(http, status, {"error": {"message": text, "code": status}}, wait)

    def has_key(self, http: BaseHTTPRequestHandler) -> bool:
        if not self.key or http.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        self.error(http, 401, f"Unauthorized: {http.headers.get('Authorization')}")
        return False

    def list_models(self, http: BaseHTTPRequestHandler) -> None:
        if not self.has_key(http):
            return
        card = {"id": self.name, "object": "model", "root": self.root, "parent": None}
        card["max_model_len"] = self.max_length
        self.reply(http, 200, {"object": "list", "data": [card]})

    def complete(self, http: BaseHTTPRequestHandler) -> None:
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        if not self.has_key(http):
            return
        # The client asks for one token to find out which model this is; no test asks for one.
        is_probe = body.get("max_tokens") == 1
        with self.lock:
            fault = self.script.pop(0) if self.script and not is_probe else ""
            if not is_probe:
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            status, _, wait = fault.partition(" ")
            if status.isdecimal():
                text = f"no: {http.headers.get('Authorization')}"
                self.error(http, int(status), text, wait)
                return
            try:
                embeds = self.read_prompt(body)
            except Refused as refused:
                self.error(http, 400, str(refused))
                return
            if not is_probe:
                self.bodies.append(body)
            self._stream(http, body, embeds, fault)
        except (Disconnected, ConnectionError):
            self.aborted += 1
        finally:
            if not is_probe:
                with self.lock:
                    self.at_once -= 1

    def read_prompt(self, body: dict) -> torch.Tensor:
        """Return the embeddings of a prompt, (tokens, hidden). Raises Refused."""
        if set(body) - FIELDS:
            raise Refused(f"unknown fields {set(body) - FIELDS}")
        if body["model"] != self.name or not body["stream"]:
            raise Refused(f"the model {body['model']!r} does not exist")
        table = self.model.get_input_embeddings()
        if "prompt_embeds" in body:
            data = base64.b64decode(body["prompt_embeds"], validate=True)
            embeds = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            if embeds.dim() != 2 or not embeds.is_floating_point():
                raise Refused(f"`prompt_embeds` must be a 2D tensor; got {tuple(embeds.shape)}")
            if embeds.shape[1] != table.weight.shape[1]:
                raise Refused(f"`prompt_embeds` hidden_size {embeds.shape[1]} does not match")
            if embeds.untyped_storage().nbytes() != embeds.nbytes:
                raise Refused("the whole storage was sent")
        else:
            embeds = table(torch.tensor(body["prompt"])).detach()
        if len(embeds) + body["max_tokens"] > self.max_length:
            raise Refused(f"the context length is {self.max_length} tokens")
        return embeds.to(table.weight.dtype)

    def _stream(
        self, http: BaseHTTPRequestHandler, body: dict, embeds: torch.Tensor, fault: str
    ) -> None:
        http.send_response(200)
        http.send_header("Content-Type", "text/event-stream")
        http.send_header("Transfer-Encoding", "chunked")
        http.end_headers()
        sent: list[int] = []

        def write(text: str) -> None:
            data = text.encode()
            http.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            http.wfile.flush()

        def send(tokens: list[int], finish_reason: str | None = None) -> None:
            sent.extend(tokens)
            choice = {"index": 0, "text": "", "token_ids": tokens, "finish_reason": finish_reason}
            if fault == "no token_ids":
                del choice["token_ids"]
            write(f"data: {json.dumps({'choices': [choice]})}\n\n")
            if fault == "cut off" and len(sent) == 2:
                http.close_connection = True
                raise Disconnected
            if fault == "echo":
                write(f"data: {'x' * 70}{http.headers.get('Authorization')}\n\n")
            if fault == "no JSON":
                write("data: {half\n\n")
            if fault == "error event":
                write('data: {"error": {"message": "EngineDeadError", "code": 500}}\n\n')
            while tokens and not self.gate.is_set() and body["max_tokens"] > 1:
                write(": waiting\n\n")  # Fails when the client has gone.
                time.sleep(0.01)

        if fault == "hang":
            while True:
                write(": hang\n\n")
                time.sleep(0.01)
        if fault == "silence":
            time.sleep(2)
            raise Disconnected
        finish_reason = self.generate(body, embeds, send)
        send([], finish_reason)
        write("data: [DONE]\n\n")
        http.wfile.write(b"0\r\n\r\n")

    @torch.no_grad()
    def generate(self, body: dict, embeds: torch.Tensor, send: Callable[[list[int]], None]) -> str:
        """Generate by the stock loop, and return why it ended."""
        settings: dict[str, Any] = {"do_sample": body["temperature"] > 0}
        if settings["do_sample"]:
            torch.manual_seed(body["seed"] % 2**31)
            settings |= {name: body[name] for name in ("temperature", "top_p", "top_k")}
        if body.get("min_tokens"):
            settings["min_new_tokens"] = body["min_tokens"]
        ends = body["stop_token_ids"]
        output = self.model.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            max_new_tokens=body["max_tokens"],
            eos_token_id=ends,
            pad_token_id=0,
            streamer=EventStreamer(send),
            **settings,
        )
        return "stop" if output[0, -1].item() in ends else "length"
