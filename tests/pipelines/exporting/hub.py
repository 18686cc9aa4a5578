"""A stand-in for the Hugging Face hub on localhost: as much of its interface as pushing and pulling
a private model takes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_of_a_test"


@dataclass(kw_only=True)
class Hub:
    """`repositories`: the files of each, by name; `seen`: every request."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by digest
    seen: list[str] = field(default_factory=list)

    def commit(self, repository: str) -> str:
        content = json.dumps(
            {name: digest(file) for name, file in self.repositories[repository].items()}
        )
        return hashlib.sha1(content.encode()).hexdigest()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/stored/" in path:  # an address that is signed, and needs no token
            self.hub.stored[path.rpartition("/")[2]] = body
            self.answer({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "no such token"}, status=401)
        elif self.command == "POST":
            self.posted(path, body)
        else:
            self.asked(path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def posted(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path.endswith("/commit/main"):
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            files = hub.repositories[repository]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
            oid = hub.commit(repository)
            self.answer({"commitOid": oid, "commitUrl": f"{hub.url}/{repository}/commit/{oid}"})
            return
        if "/paths-info/" in path:
            repository = path.removeprefix("/api/models/").partition("/paths-info/")[0]
            wanted = parse_qs(body.decode()).get("paths", [])
            self.answer([each for each in self.listed(repository) if each["path"] in wanted])
            return
        given = json.loads(body)
        if path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            hub.private.setdefault(name, given.get("visibility") == "private")
            known = name in hub.repositories
            hub.repositories.setdefault(name, {})
            self.answer({"url": f"{hub.url}/{name}"}, status=409 if known else 200)
        elif path == "/api/validate-yaml":
            yaml.safe_load(given["content"].split("---")[1])
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in path:
            large = {True: "lfs", False: "regular"}
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": large[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in given["files"]
            ]
            self.answer({"files": modes})
        else:
            assert path.endswith("/info/lfs/objects/batch"), path
            places = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/stored/{each['oid']}"}}}
                for each in given["objects"]
            ]
            self.answer({"transfer": "basic", "objects": places})

    def asked(self, path: str) -> None:
        hub = self.hub
        for repository, files in hub.repositories.items():
            api, resolved = f"/api/models/{repository}", f"/{repository}/resolve/"
            if path == f"{api}/tree/main":
                self.answer(self.listed(repository))
                return
            if path.startswith(f"{api}/tree/"):
                self.answer({}, status=404, error="EntryNotFound")
                return
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                sha = hub.commit(repository)
                self.answer({"id": repository, "sha": sha, "siblings": siblings, "private": True})
                return
            name = path.removeprefix(resolved).partition("/")[2]
            if path.startswith(resolved) and name in files:
                self.answer(files[name], commit=hub.commit(repository))
                return
            if path.startswith(resolved):
                commit = hub.commit(repository)
                self.answer({}, status=404, commit=commit, error="EntryNotFound")
                return
        self.answer({}, status=404, error="RepoNotFound")

    def listed(self, repository: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": digest(content)}
            for name, content in self.hub.repositories[repository].items()
        ]

    def answer(
        self, content: Any, *, status: int = 200, commit: str | None = None, error: str = ""
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{digest(body)}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
