"""A hub on this machine: the requests of `push_to_hub`, and files of repositories in memory.

`FakeHub.run` runs Python in a process of its own, because huggingface_hub reads the address of the
hub when it is imported.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tests.machine import PATIENCE


class FakeHub(ThreadingHTTPServer):
    """A hub of models and datasets.

    Attributes:
        files: bytes of each file of a model, by (repository, path).
        dataset_files: bytes of each file of a dataset, by (repository, revision, path).
        gated: datasets that are listed, but whose files nobody may download.
        downloads: paths of the files of datasets that were sent, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.dataset_files: dict[tuple[str, str, str], bytes] = {}
        self.gated: set[str] = set()
        self.downloads: list[str] = []

    def commit_of(self, repo: str, revision: str) -> str | None:
        """Return the hash of a revision of a dataset; None if there is no such revision."""
        named = [
            (path, content)
            for (of_repo, of_revision, path), content in self.dataset_files.items()
            if (of_repo, of_revision) == (repo, revision)
        ]
        return hashlib.sha1(repr((repo, sorted(named))).encode()).hexdigest() if named else None

    def files_at(self, repo: str, commit: str) -> dict[str, bytes]:
        """Return path -> bytes of a dataset at a commit."""
        files = {}
        for (of_repo, revision, path), content in self.dataset_files.items():
            if of_repo == repo and self.commit_of(repo, revision) == commit:
                files[path] = content
        return files

    def text(self, repo: str, path: str) -> str:
        return self.files[repo, path].decode()

    def run(self, code: str, **variables: str) -> subprocess.CompletedProcess:
        """Run Python with this hub and environment variables; return its output and status."""
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_TOKEN": "hf_of_the_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1",
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


@contextmanager
def open_fake_hub() -> Iterator[FakeHub]:
    """Serve a hub until the block ends."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    @property
    def origin(self) -> str:
        return f"http://{self.headers['Host']}"

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) == 6:
            self.reply_listing("/".join(parts[2:4]), parts[4], unquote(parts[5]))
        elif parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            self.reply_dataset_file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        elif parts[:2] == ["api", "models"]:
            self.reply_model("/".join(parts[2:4]), parts[4:])
        elif len(parts) > 4 and parts[2] == "resolve":
            content = self.server.files.get(("/".join(parts[:2]), "/".join(parts[4:])))
            if content is None:
                self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
            else:
                headers = {"ETag": f'"{hash(content)}"', "X-Repo-Commit": "0" * 40}
                self.reply(content, 200, headers)
        else:
            self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def reply_model(self, repo: str, request: list[str]) -> None:
        """Reply with the state of a model's repository, or with a list of its files.

        Args:
            request: the parts of the address after the repository, such as ["tree", "main"].
        """
        files = {
            path: content for (name, path), content in self.server.files.items() if name == repo
        }
        if not files:
            self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif request[:1] != ["tree"]:
            self.reply_json({"id": repo, "sha": "0" * 40})
        elif len(request) > 2:  # A folder of templates, which no repository has.
            self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            entries = []
            for path, content in files.items():
                entry = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                entries.append(entry)
            self.reply_json(entries)

    def reply_listing(self, repo: str, kind: str, revision: str) -> None:
        """Reply to a request for a revision of a dataset, or for the files of a commit."""
        if not any(of_repo == repo for of_repo, _, _ in self.server.dataset_files):
            return self.reply(b"", 401, {"X-Error-Code": "RepoNotFound"})
        if kind == "revision":
            # A commit is a revision, too.
            is_commit = bool(self.server.files_at(repo, revision))
            commit = revision if is_commit else self.server.commit_of(repo, revision)
            if commit is None:
                return self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            files = self.server.files_at(repo, commit)
            siblings = [{"rfilename": path} for path in files]
            return self.reply_json({"id": repo, "sha": commit, "siblings": siblings})
        entries = []
        for path, content in self.server.files_at(repo, revision).items():
            oid = hashlib.sha1(content).hexdigest()
            entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
        self.reply_json(entries)

    def reply_dataset_file(self, repo: str, commit: str, path: str) -> None:
        content = self.server.files_at(repo, unquote(commit)).get(unquote(path))
        if repo in self.server.gated:
            self.reply(b"", 403, {"X-Error-Code": "GatedRepo"})
        elif content is None:
            self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            if self.command == "GET":
                self.server.downloads.append(path)
            tag = hashlib.sha1(content).hexdigest()
            self.reply(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            name = json.loads(body)["name"]
            self.reply_json({"url": f"{self.origin}/me/{name}", "name": f"me/{name}"})
        elif parts == ["api", "validate-yaml"]:
            self.reply_json({"errors": [], "warnings": []})
        elif "preupload" in parts:
            files = []
            for file in json.loads(body)["files"]:
                own = {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                files.append(own)
            self.reply_json({"files": files})
        elif "commit" in parts:
            repo = "/".join(parts[2:4])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    content = base64.b64decode(value["content"])
                    self.server.files[repo, value["path"]] = content
            self.reply_json({"commitUrl": f"{self.origin}/{repo}/commit/1", "commitOid": "0" * 40})
        else:
            self.reply(b"", 404)

    def reply_json(self, value: dict | list) -> None:
        self.reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def reply(self, content: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
