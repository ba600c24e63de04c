"""A small hub on loopback: repositories, regular and LFS uploads, commits, ranges, faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_of_the_tests"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    sha: str = "0" * 40


@dataclass
class Hub:
    """Its state; ``faults`` are (method, part of the path, status or "cut"), each used once."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple[str, str, int | str]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(size)
        self.hub.requests.append((self.command, path))
        for fault in self.hub.faults:
            if fault[0] == self.command and fault[1] in path:
                self.hub.faults.remove(fault)
                if fault[2] == "cut":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._answer(int(fault[2]), {"error": "an injected fault"})
                return
        open_to_all = path.startswith("/lfs/")
        if not open_to_all and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
            return
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else ""):
                action(self, body, *match.groups())
                return
        self._answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            url = f"{self.hub.endpoint}/{name}"
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private)
        self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def _yaml(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def _preupload(self, body: bytes, name: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        answers = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(".safetensors")
            held = repository.files.get(file["path"])
            oid = None
            if held is not None:
                oid = hashlib.sha256(held).hexdigest() if lfs else git_oid(held)
            mode = "lfs" if lfs else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._answer(200, {"files": answers})

    def _batch(self, body: bytes, name: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            item = dict(wanted)
            if wanted["oid"] not in self.hub.blobs:
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(item)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _blob(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "another content"})
            return
        self.hub.blobs[oid] = body
        self._answer(200)

    def _verify(self, body: bytes, oid: str) -> None:
        self._answer(200 if oid in self.hub.blobs else 404)

    def _commit(self, body: bytes, name: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.sha = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.endpoint}/{name}/commit/{repository.sha}"
        self._answer(200, {"commitUrl": url, "commitOid": repository.sha, "success": True})

    def _tree(self, body: bytes, name: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        self._answer(200, [
            {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            for path, content in repository.files.items()
        ] or b"[]")  # fmt: skip

    def _info(self, body: bytes, name: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        siblings = [{"rfilename": path} for path in repository.files]
        self._answer(200, {
            "id": name, "sha": repository.sha, "private": repository.private, "tags": [],
            "siblings": siblings, "downloads": 0, "likes": 0,
        })  # fmt: skip

    def _resolve(self, body: bytes, name: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        content = repository.files.get(path)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound",
                         X_Repo_Commit=repository.sha)  # fmt: skip
            return
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X_Repo_Commit": repository.sha,
            "Accept_Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            stop = min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{stop}/{len(content)}"
            self._answer(206, content[start : stop + 1], **headers)
            return
        self._answer(200, content, **headers)


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._yaml),
    ("POST", f"/api/models/{_NAME}/preupload/main", _Handler._preupload),
    ("POST", f"/{_NAME}.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/lfs/(\w+)", _Handler._blob),
    ("POST", r"/lfs/(\w+)/verify", _Handler._verify),
    ("POST", f"/api/models/{_NAME}/commit/main", _Handler._commit),
    ("GET", f"/api/models/{_NAME}/tree/[^/]+", _Handler._tree),
    ("GET", f"/api/models/{_NAME}(?:/revision/[^/]+)?", _Handler._info),
    ("GET", f"/{_NAME}/resolve/[^/]+/(.+)", _Handler._resolve),
]


@contextmanager
def serve(port: int = 0) -> Iterator[Hub]:
    """Runs a hub on a port of loopback, by default a free one."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
