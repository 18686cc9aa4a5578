"""The models that an evaluation puts side by side, and where each of them comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsl.denoiser import Denoiser
from infra import journal, registry, tracking
from infra.errors import DataError, nearest
from infra.storage import Folder
from pipelines import models
from pipelines.evaluation.held_out import HeldOut
from pipelines.models import ConverterConfig

Origin = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under evaluation; `kind` is what it was trained for: mdlm, ar or dsl."""

    name: str
    kind: str
    denoiser: Denoiser
    origin: Origin

    def facts(self) -> dict[str, Any]:
        """Where it came from, what it is and how large."""
        parameters = sum(p.numel() for p in self.denoiser.parameters())
        return {**self.origin, "kind": self.kind, "parameters": parameters}


def origin(name: str, address: str, *, uri: str, root: str) -> Origin:
    """What an address means now: the `version` behind an alias, the run that made the model
    (`run_id`), that run's directory (`run`), as far as each is known.

    Raises DataError, with the nearest name, where nothing is there.
    """
    if address.startswith("models:/"):
        version = registry.describe(address, uri)
        found = {"address": address, "version": version.uri, "run_id": version.run_id}
        runs = Folder.at(root)
        made = [run for run in runs.names() if _run_id(runs / run) == version.run_id]
        return found | ({"run": (runs / made[0]).url} if made else {})
    folder = Folder.at(address)
    if not folder.exists():
        parent, last = Folder.holding(address.rstrip("/"))
        near = nearest(last, parent.names())
        fix = f"Did you mean {parent.url_of(near)}?" if near else "Give a run, a model or models:/…"
        raise DataError(f"models.{name}", f"{address}: no such model", fix)
    found = {"address": address, "run_id": _run_id(folder)}
    return found | ({"run": folder.url} if folder.exists(journal.NAME) else {})


def _run_id(folder: Folder) -> str | None:
    if not folder.exists(tracking.RECORD):
        return None
    return json.loads(folder.read_bytes(tracking.RECORD)).get("run_id")


def load(
    name: str, origin: Origin, held_out: HeldOut, *, converter: ConverterConfig, uri: str
) -> Subject:
    """The model of an origin, on the GPU if there is one.

    Raises DataError where it was trained on another vocabulary or length than the data has.
    """
    where = f"models.{name}"
    # The version that was found, should the alias move meanwhile.
    address = origin.get("version", origin["address"])
    model = models.load(address, converter=converter, tracking_uri=uri)
    models.require_same(model, held_out.vocabulary, where)
    length = held_out.manifest.length
    if model.length not in (None, length):
        why = f"{address} was trained on rows of {model.length} tokens, the data has {length}"
        raise DataError(where, why, f"Prepare the data with length={model.length}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser = model.denoiser.to(device).eval()
    return Subject(name=name, kind=model.kind, denoiser=denoiser, origin=origin)
