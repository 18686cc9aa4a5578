"""Models as strangers save them: folders of a tiny random GPT-2, and a hub that hands them out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from dsl.vocabulary import END_OF_TEXT, Vocabulary
from tests.pipelines import tiny

POSITIONS = 48
COMMIT = "0" * 40


def tokenizer() -> Any:
    """A byte-level BPE of 300 tokens with GPT-2's one end mark."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = Vocabulary.train_bpe(tiny.documents(), 300).to_json()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(content),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=POSITIONS,
    )


def gpt2(folder: Path, *, head: bool = True, **settings: Any) -> Path:
    """Save a random GPT-2 of two layers; the folder."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    encoder = tokenizer()
    config = GPT2Config(
        vocab_size=len(encoder),
        n_positions=POSITIONS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=encoder.bos_token_id,
        eos_token_id=encoder.eos_token_id,
        **settings,
    )
    torch.manual_seed(0)
    model = (GPT2LMHeadModel if head else GPT2Model)(config)
    return save(model, encoder, folder)


def save(model: Any, encoder: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    encoder.save_pretrained(folder)
    return folder


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[str]:
    """A server that hands out folders by name as huggingface.co does; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
            name = next((name for name in repositories if path.startswith(name)), None)
            if name is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = {file.name: file.read_bytes() for file in repositories[name].iterdir()}
            verb, *rest = path.removeprefix(name).strip("/").split("/")
            if verb == "resolve":
                if rest[1] not in files:
                    return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return self.reply(200, files[rest[1]], {"ETag": f'"{rest[1]}"'})
            if verb == "tree":
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": COMMIT}
                    for file, content in files.items()
                ]
                return self.reply(200, json.dumps(tree).encode(), {})
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            return self.reply(200, json.dumps(info).encode(), {})

        def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            own = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
            for key, value in (own | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
