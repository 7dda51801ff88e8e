"""A hub on this machine: the few addresses that the real client asks for when it uploads, and its cache's layout."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TOKEN = "hf_of-a-test"


@dataclass
class Hub:
    """What was asked of it, and the files of its one repository.

    Attributes:
        refuse: part of what is asked -> (status, message) that it answers with instead.
        asked: "POST /path" and so on, in order.
    """

    endpoint: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content
    commits: list[dict[str, Any]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> Any:
        """The JSON that an address answers with."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.endpoint}/{self.created[-1]['organization']}/{self.created[-1]['name']}"}
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            link = [{"upload": {"href": f"{self.endpoint}/large/{one['oid']}"}} for one in objects]
            return {"objects": [{**one, "actions": actions} for one, actions in zip(objects, link, strict=True)]}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": _mode(name), "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            return self._commit(path, body)
        assert path == "/api/validate-yaml", path
        return {}

    def _commit(self, path: str, body: bytes) -> Any:
        lines = [json.loads(line) for line in body.splitlines()]
        self.commits.append({**lines[0]["value"], "path": path})
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            self.files[value["path"]] = self.large[value["oid"]] if large else base64.b64decode(value["content"])
        oid = sha1(body).hexdigest()
        page = f"{self.endpoint}/{path.removeprefix('/api/models/').partition('/commit/')[0]}"
        pr = f"{page}/discussions/1" if "create_pr=1" in path else None
        return {"commitOid": oid, "commitUrl": f"{page}/commit/{oid}", "pullRequestUrl": pr}

    def as_cache(self, folder: Path, repo_id: str) -> Path:
        """The files as huggingface_hub keeps a download: blobs, a snapshot of links to them, and a ref."""
        root = folder / f"models--{repo_id.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        for name, content in self.files.items():
            blob, link = root / "blobs" / sha256(content).hexdigest(), root / "snapshots" / commit / name
            for file in (blob, link):
                file.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.symlink_to(blob)
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        return root / "snapshots" / commit


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".bin")) else "regular"


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that answers while the block runs, to whoever has its token."""
    from huggingface_hub import constants

    here = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = _chunks(self.rfile)
            path = self.path.partition("?")[0]
            here.asked.append(f"{self.command} {path}")
            status, message = next((no for part, no in here.refuse.items() if part in here.asked[-1]), (200, ""))
            if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, message = 401, "Invalid credentials in Authorization header"
            content: Any = {"error": message} if status != 200 else here.answer(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _reply

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose server is another one
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", here.endpoint)
    try:
        yield here
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _chunks(stream: Any) -> bytes:
    parts = []
    while size := int(stream.readline(), 16):
        parts.append(stream.read(size))
        stream.readline()
    stream.readline()
    return b"".join(parts)
