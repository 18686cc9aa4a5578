"""An object store on localhost that fails as it is told: moto's S3 behind a layer of faults.

    with FaultyStore() as store:
        store.fail(answer(503), method="PUT", key="*.safetensors", times=2)

A fault stands between the socket and the store. It may answer by itself, wait, or cut the
connection; whatever it lets through is counted in `store.requests`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from io import BytesIO
from typing import Any
from unittest import mock
from urllib.parse import unquote
from wsgiref.types import StartResponse, WSGIApplication

from moto.backends import get_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import Client

from infra import storage
from infra.storage import Folder

BUCKET = "bucket"
KEY_ID, SECRET = "AKIASENTINELKEYID", "sentinel-of-a-secret-access-key"

# What stands in the way of a request: it may call the store, and gets what a WSGI server has.
Fault = Callable[[WSGIApplication, dict[str, Any], StartResponse], Iterable[bytes]]
ERRORS = {500: ("Internal Server Error", "InternalError"), 503: ("Slow Down", "SlowDown")}


@dataclass(frozen=True)
class Request:
    """What came in: bytes of body each way, as they were asked for and answered."""

    method: str
    key: str
    sent: int
    received: int


@dataclass
class _Rule:
    fault: Fault
    method: str
    key: str
    left: float
    hits: int = 0

    def fits(self, environ: dict[str, Any]) -> bool:
        methods, key = self.method.split("|"), _key(environ)
        return self.left > 0 and environ["REQUEST_METHOD"] in methods and fnmatch(key, self.key)


@dataclass
class FaultyStore:
    """A context: the server runs in threads of this process, and the environment points to it."""

    requests: list[Request] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(
        self, fault: Fault, *, method: str = "GET|HEAD|PUT|POST|DELETE", key: str = "*",
        times: float = float("inf"),
    ) -> _Rule:  # fmt: skip
        """Let requests fail: HTTP methods joined by |, a pattern of keys, how many of them."""
        rule = _Rule(fault, method, key, times)
        self._rules.append(rule)
        return rule

    def heal(self) -> None:
        self._rules.clear()

    @contextmanager
    def lent(self) -> Iterator[FaultyStore]:
        """To one test: whatever it did to the store ends with it."""
        yield self
        self.heal()
        self.requests.clear()
        self.forget_clients()

    def count(self, method: str, key: str = "*") -> int:
        return sum(r.method == method and fnmatch(r.key, key) for r in self.requests)

    def peek(self, key: str) -> bytes:
        """What an object holds, b"" if there is none: past all faults, and not counted."""
        signed = f"AWS4-HMAC-SHA256 Credential={KEY_ID}/20000101/us-east-1/s3/aws4_request"
        found = Client(self._store).get(f"/{BUCKET}/{key}", headers={"Authorization": signed})
        return found.data if found.status_code == 200 else b""

    def __enter__(self) -> FaultyStore:
        self._store = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._app, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = environment(self._server.server_port)
        self._patch = mock.patch.dict(os.environ, self.environment)
        self._patch.start()
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
            os.environ.pop(name, None)
        self.forget_clients()
        self.filesystem.mkdir(BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._patch.stop()
        self.forget_clients()
        get_backend("s3").reset()  # moto keeps one for all servers of a process

    def unfinished(self, folder: Folder) -> list[str]:
        """Keys of the uploads that were begun there and neither completed nor given up."""
        keys = [upload["Key"] for upload in self.filesystem.list_multipart_uploads(BUCKET)]
        return [key for key in keys if f"{BUCKET}/{key}".startswith(folder.path)]

    @staticmethod
    def forget_clients() -> None:
        """A client keeps the endpoint, the credentials and the patience it was made with."""
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        storage._arrow_s3.cache_clear()

    @property
    def filesystem(self) -> Any:
        """The store, asked by a client of its own."""
        import s3fs

        return s3fs.S3FileSystem(use_listings_cache=False)

    def _app(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        with self._lock:
            rule = next((rule for rule in self._rules if rule.fits(environ)), None)
            if rule:
                rule.left -= 1
                rule.hits += 1
        if rule:
            return rule.fault(self._counted, environ, start_response)
        return self._counted(environ, start_response)

    def _counted(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        body = b"".join(self._store(environ, start_response))
        self.requests.append(
            Request(
                environ["REQUEST_METHOD"],
                _key(environ),
                int(environ.get("CONTENT_LENGTH") or 0),
                len(body),
            )
        )
        return [body]


def environment(port: int) -> dict[str, str]:
    """What points clients to a store of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def answer(status: int) -> Fault:
    """Refuse with an S3 error of that status."""
    reason, code = ERRORS[status]
    document = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()

    def fault(store: WSGIApplication, environ: Any, start_response: StartResponse) -> list[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = b"" if environ["REQUEST_METHOD"] == "HEAD" else document
        length = str(len(body))
        start_response(
            f"{status} {reason}", [("Content-Type", "application/xml"), ("Content-Length", length)]
        )
        return [body]

    return fault


def slow(seconds: float) -> Fault:
    """Answer, but late."""

    def fault(store: Any, environ: Any, start_response: StartResponse) -> Iterable[bytes]:
        time.sleep(seconds)
        return store(environ, start_response)

    return fault


def cut_request(store: Any, environ: Any, start_response: StartResponse) -> Iterable[bytes]:
    """Hang up in the middle of the body that the client sends; the store hears nothing of it."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
    return _hang_up(environ)


def cut_answer(store: Any, environ: Any, start_response: StartResponse) -> Iterable[bytes]:
    """Do what is asked, and hang up in the middle of the answer."""
    told: list[Any] = []
    body = b"".join(store(environ, lambda *head: told.extend(head)))
    status, headers = told[:2]
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers), "", ""]
    environ["werkzeug.socket"].sendall("\r\n".join(lines).encode()[: None if body else -2])
    environ["werkzeug.socket"].sendall(body[: len(body) // 2])
    return _hang_up(environ)


FAULTS: dict[str, Fault] = {
    "500": answer(500),
    "503": answer(503),
    "slow": slow(1.0),
    "cut request": cut_request,
    "cut answer": cut_answer,
}


def _hang_up(environ: Any) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    environ["wsgi.input"] = BytesIO()
    raise ConnectionResetError


def _key(environ: dict[str, Any]) -> str:
    """Of a path-style request; a listing's is the prefix that it asks for."""
    return unquote(environ["PATH_INFO"]).removeprefix(f"/{BUCKET}").lstrip("/")


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Nothing: the requests are counted."""
