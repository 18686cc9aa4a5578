"""The models that an evaluation puts side by side: where each comes from, and a copy of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsl.denoiser import geometry_report
from dsl.weights import WEIGHTS
from infra import journal, registry, tracking
from infra.errors import DataError, nearest
from infra.storage import Folder
from pipelines import models
from pipelines.evaluation.held_out import HeldOut
from pipelines.kinds import KINDS, ModelKind
from pipelines.models import ConverterConfig

Origin = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under evaluation. `kind` is a name in `pipelines.kinds`; `facts` say how large it
    is, what its table looks like, and the digest of its weights."""

    name: str
    kind: str
    origin: Origin
    facts: Mapping[str, Any]

    @property
    def trained_as(self) -> ModelKind:
        return KINDS[self.kind]


def origin(where: str, address: str, *, uri: str, root: str) -> Origin:
    """What an address means now: the `version` behind an alias, the run that made the model
    (`run_id`), that run's directory (`run`), as far as each is known; where there is no version,
    the `digest` of what lies at the address.

    where: the dotted path of the setting that names it.
    Raises DataError, with the nearest name, where nothing is there.
    """
    if address.startswith("models:/"):
        version = registry.describe(address, uri)
        found = {
            "address": address,
            "name": version.name,
            "version": version.uri,
            "run_id": version.run_id,
        }
        runs = Folder.at(root)
        names = runs.names() if version.run_id else ()
        made = [run for run in names if _run_id(runs / run) == version.run_id]
        return found | ({"run": (runs / made[0]).url} if made else {})
    folder = Folder.at(address)
    if not folder.exists():
        parent, last = Folder.holding(address.rstrip("/"))
        near = nearest(last, parent.names())
        fix = f"Did you mean {parent.url_of(near)}?" if near else "Give a run, a model or models:/…"
        raise DataError(where, f"{address}: no such model", fix)
    found = {"address": address, "run_id": _run_id(folder), "digest": models.digest(address)}
    return found | ({"run": folder.url} if folder.exists(journal.NAME) else {})


def _run_id(folder: Folder) -> str | None:
    handle = tracking.opened(folder.url)
    return handle.run_id if handle else None


def freeze(
    name: str,
    origin: Origin,
    held_out: HeldOut,
    into: Folder,
    *,
    where: str,
    converter: ConverterConfig,
    uri: str,
    trust_remote_code: bool,
) -> Subject:
    """Copy the model of an origin below `into`, where every worker and every restart finds it.

    where: the dotted path of the setting that names it.
    Raises DataError where it was trained on another vocabulary or length than the data has, or
    does not take rows of that length.
    """
    # The version that was found, should the alias move meanwhile.
    address = origin.get("version", origin["address"])
    # The fresh table that an MDLM checkpoint gets is the same each time.
    torch.manual_seed(0)
    model = models.load(
        address, converter=converter, tracking_uri=uri, trust_remote_code=trust_remote_code
    )
    models.require_same(model, held_out.vocabulary, where)
    length = held_out.manifest.length
    if model.length not in (None, length):
        why = f"{address} was trained on rows of {model.length} tokens, the data has {length}"
        raise DataError(where, why, f"Prepare the data with length={model.length}")
    models.require_room(model.denoiser, length, where)
    kind, denoiser = model.kind, model.denoiser
    models.save(into / name, denoiser, held_out.vocabulary, kind=kind, length=length)
    facts = {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "weights": hashlib.sha256((into / name).read_bytes(WEIGHTS)).hexdigest(),
    }
    if KINDS[kind].finite_snr:
        facts |= geometry_report(denoiser.table_VD) | {"beta": denoiser.converter.beta.item()}
    return Subject(name=name, kind=kind, origin=origin, facts=facts)
