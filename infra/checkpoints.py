"""Checkpoints of a training run in any folder: sharded, asynchronous, valid once committed.

    checkpoints/step_000400/commit.json                  step, meta, index, files: written last
                            1f0c9a2b-00000.safetensors   one per rank, its chunk of each tensor

`save` copies the tensors to the CPU and returns; a thread on each rank writes. These threads
communicate over a gloo group of their own, apart from the collectives of training: every rank
reports whether its file was written, rank 0 commits, and all ranks learn the outcome at the same
`save` or `wait`. A folder without a commit does not count. Nothing is ever unpickled.

The commit holds a sha256 of each chunk and of itself, verified when they are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from infra import dcp
from infra.credentials import scrub
from infra.dcp import Damaged
from infra.errors import DataError, InfraError, Problem
from infra.storage import Folder

COMMIT = "commit.json"
PAUSES_S = (1.0, 4.0, 16.0)  # before each further attempt at a failed write
FAULTS = 4  # named in a message
NONE_LEFT = "No undamaged checkpoint is left; existing=restart trains anew"
PEER_TIMEOUT = timedelta(hours=2)  # how long one rank's write may outlast another's

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What makes a folder a checkpoint: its meta, and what its files must be."""

    format: Literal[1] = 1
    step: int
    meta: dict[str, Any]
    files: dict[str, int]  # bytes of each
    tensors: dict[str, dcp.Entry]

    def __post_init__(self) -> None:
        used = {chunk.file for entry in self.tensors.values() for chunk in entry.chunks}
        if unknown := used - self.files.keys():
            raise ValueError(f"the index names files that are not listed: {sorted(unknown)}")


_COMMIT = TypeAdapter(Commit)


class Checkpoints:
    """The checkpoints of one run. All ranks call `save`, `wait`, `load` and `resume` together."""

    def __init__(
        self,
        folder: Folder | str,
        *,
        keep: int,
        milestone_every: int | None = None,
        max_failures: int = 3,
        permit: Callable[[], None] = lambda: None,
        corrupt: Literal["stop", "skip"] = "stop",
    ) -> None:
        """keep: how many of the latest stay, besides the multiples of `milestone_every` steps.

        max_failures: that many failed checkpoints in a row end the run with an InfraError; fewer
        are warnings.
        permit: called before a commit; raises if this process may no longer write the run.
        corrupt: what `resume` does with a damaged checkpoint.
        """
        self.folder = Folder.at(folder)
        self.keep, self.milestone_every = keep, milestone_every
        self.max_failures, self.permit, self.corrupt = max_failures, permit, corrupt
        self._writing: tuple[int, threading.Thread] | None = None
        self._failure: str | None = None  # of the write in flight; set by its thread
        self._failures = 0
        self._last: int | None = None
        self._group: dist.ProcessGroup | None = None

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return committed(self.folder)

    @property
    def last(self) -> int | None:
        """The last step that the ranks know to be committed, without asking the store."""
        if self._writing and not self._writing[1].is_alive() and self._failure is None:
            return self._writing[0]
        return self._last

    @property
    def failures(self) -> int:
        """How many checkpoints in a row have failed, as far as this process knows."""
        if self._writing and not self._writing[1].is_alive():
            return self._failures + 1 if self._failure else 0
        return self._failures

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`, after the one in flight has ended.

        tensors: DTensors or plain tensors (equal on all ranks), copied before this returns.
        meta: JSON values: whatever else a resumed run must know.
        Raises InfraError, on all ranks, when `max_failures` checkpoints in a row have failed.
        """
        self.wait()
        meta = json.loads(json.dumps(meta))  # a copy, and an error now where it is not JSON
        staged = dcp.stage(tensors)
        self._meet()
        thread = threading.Thread(target=self._write, args=(step, staged, meta), daemon=True)
        self._writing = (step, thread)
        thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint in flight and judge it; raises as `save` does."""
        if self._writing is None:
            return
        (step, thread), self._writing = self._writing, None
        thread.join()
        if self._failure is None:
            self._failures, self._last = 0, step
            return
        self._failures += 1
        if self._failures < self.max_failures:
            log.warning("checkpoint of step %d failed, training goes on: %s", step, self._failure)
            return
        good = "none" if self._last is None else f"step {self._last}"
        raise InfraError(
            _at(self.folder, step).url,
            f"{self._failures} checkpoints in a row failed, last good one: {good}. {self._failure}",
            "Mend the store, then start the run again: it resumes",
        )

    def load(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place from a committed step, whatever the sharding; its meta.

        Raises DataError, on all ranks, if the step is not there, is damaged, or has other tensors.
        """
        self._meet()
        folder = _at(self.folder, step)
        commit = self._from_rank_0(lambda: _read_commit(self.folder, step))
        _must_match(folder, commit.tensors, tensors)
        dcp.read(folder, commit.tensors, tensors, alone=False)
        self._last = step
        return commit.meta

    def resume(self, tensors: dict[str, Tensor]) -> tuple[int | None, dict[str, Any]]:
        """Load the last committed step; that step and its meta, (None, {}) if there is none.

        A damaged checkpoint raises Damaged. With corrupt="skip" the one before it is loaded
        instead, and the damaged one loses its commit, so that it no longer counts. Damaged where
        no other is left.
        """
        self._meet()
        damaged: dict[int, Damaged] = {}
        for step in reversed(self._from_rank_0(self.steps)):
            try:
                meta = self.load(step, tensors)
            except Damaged as problem:
                if self.corrupt == "stop":
                    raise
                damaged[step] = problem
                continue
            for bad, problem in damaged.items():
                log.warning("skipped: %s", problem)
                if not dist.is_initialized() or dist.get_rank() == 0:
                    _at(self.folder, bad).remove(COMMIT)
            return step, meta
        if damaged:
            problem = damaged[max(damaged)]
            raise Damaged(problem.where, problem.why, NONE_LEFT)
        return None, {}

    def _write(self, step: int, staged: dcp.Staged, meta: dict[str, Any]) -> None:
        """The thread of each rank: write, exchange outcomes, commit, exchange the outcome."""
        try:
            folder = _at(self.folder, step)
            failed = _attempt(lambda: staged.write(folder))
            outcomes = self._all((failed, staged.digests))
            failure = next(filter(None, (failed for failed, _ in outcomes)), None)
            if failure is None and self._rank == 0:
                digests = {key: digest for _, part in outcomes for key, digest in part.items()}
                failure = _attempt(lambda: self._commit(step, staged, digests, meta))
            self._failure = next(filter(None, self._all(failure)), None)
        except Exception as error:  # a peer is gone: the launcher will end this rank too
            self._failure = _reason(error)

    def _commit(
        self, step: int, staged: dcp.Staged, digests: dict[str, str], meta: dict[str, Any]
    ) -> None:
        folder, tensors = _at(self.folder, step), staged.index(digests)
        commit = Commit(step=step, meta=meta, files=staged.sizes, tensors=tensors)
        _must_be_whole(folder, commit)
        self.permit()
        content = asdict(commit)
        content["sha256"] = _digest(content)
        folder.write_bytes(COMMIT, json.dumps(content).encode())
        try:
            self._clean(step, commit)
        except Exception as error:
            log.warning("old checkpoints could not be removed, training goes on: %s", error)

    def _clean(self, step: int, commit: Commit) -> None:
        """Remove old checkpoints, and the files of killed attempts."""
        folder = _at(self.folder, step)
        for name in set(folder.names()) - set(commit.files) - {COMMIT}:
            folder.remove(name)
        folder.remove_partial()
        steps = self.steps()
        every = self.milestone_every
        kept = {s for s in steps if every and s % every == 0} | set(
            steps[max(0, len(steps) - self.keep) :]
        )
        for old in _step_folders(self.folder):
            if old < step and old not in kept:
                _at(self.folder, old).remove(COMMIT)  # first: from here on it does not count
                _at(self.folder, old).remove()

    def _meet(self) -> None:
        """Give the ranks a group of their own, on the CPU whatever they train on."""
        if dist.is_initialized() and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=PEER_TIMEOUT)

    @property
    def _rank(self) -> int:
        return 0 if self._group is None else dist.get_rank(self._group)

    def _from_rank_0(self, ask: Callable[[], T]) -> T:
        """What rank 0 finds in the store, or its problem, on every rank: another machine's view
        may lag behind, and ranks that go on from two steps would mix them."""
        if self._group is None:
            return ask()
        found: list[Any] = [None, None]
        if self._rank == 0:
            try:
                found[0] = ask()
            except Problem as problem:
                found[1] = problem
        dist.broadcast_object_list(found, src=0, group=self._group)
        value, problem = found
        if problem:
            raise problem
        return value  # type: ignore[no-any-return]

    def _all(self, value: T) -> list[T]:
        """Every rank's value."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def committed(folder: Folder | str) -> list[int]:
    """The committed steps of a checkpoints folder, ascending."""
    folder = Folder.at(folder)
    return [step for step in _step_folders(folder) if _at(folder, step).exists(COMMIT)]


def consolidate(folder: Folder | str, step: int, prefix: str) -> dict[str, Tensor]:
    """The full tensors whose names begin with `prefix`, without the prefix, on the CPU.

    For one process, with or without a process group. Raises DataError as `Checkpoints.load`.
    """
    folder = Folder.at(folder)
    entries = {
        key: entry
        for key, entry in _read_commit(folder, step).tensors.items()
        if key.startswith(prefix)
    }
    if not entries:
        raise DataError(_at(folder, step).url, f"the checkpoint holds no tensor named {prefix}…")
    tensors = {
        key: torch.empty(entry.shape, dtype=dcp.DTYPES[entry.dtype])
        for key, entry in entries.items()
    }
    dcp.read(_at(folder, step), entries, tensors, alone=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def drop_damaged(folder: Folder | str, step: int) -> None:
    """Remove the commit of a step if the step is damaged, so that it no longer counts; Damaged
    where there is none before it."""
    folder = Folder.at(folder)
    steps = committed(folder)
    try:
        if step in steps:
            consolidate(folder, step, "")
    except Damaged as problem:
        if step == steps[0]:
            raise Damaged(problem.where, problem.why, NONE_LEFT) from None
        log.warning("skipped: %s", problem)
        _at(folder, step).remove(COMMIT)


def training_tensors(
    model: nn.Module, average: AveragedModel, optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    """The tensors of a run's state, by name: `model.*`, `ema.*`, `optimizer.*`, `ema_updates`.

    They are the live ones, so `Checkpoints.load` into them restores the run.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in average.module.state_dict().items()}
    return tensors | optimizer_tensors(model, optimizer) | {"ema_updates": average.n_averaged}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The live state of AdamW as `optimizer.<parameter>.<key>`; hyperparameters stay in the config.

    Before the first step AdamW has no state: it is made here as AdamW would make it, so that a
    fresh optimizer can be loaded into, and saving one changes nothing.
    """
    stepped = {
        parameter: bool(group["fused"] or group["capturable"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter not in stepped:
            continue
        state = optimizer.state[parameter]
        if not state:
            place = parameter.device if stepped[parameter] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    return tensors


def _at(folder: Folder, step: int) -> Folder:
    return folder / f"step_{step:06d}"


def _step_folders(folder: Folder) -> list[int]:
    """The steps that have a folder, committed or not, ascending."""
    return sorted(
        int(name.removeprefix("step_"))
        for name in folder.names()
        if re.fullmatch(r"step_\d{6,}", name)
    )


def _read_commit(folder: Folder, step: int) -> Commit:
    at = _at(folder, step)
    if not at.exists(COMMIT):
        there = ", ".join(map(str, committed(folder))) or "none"
        raise DataError(at.url, "no committed checkpoint", f"Committed steps: {there}")
    content = at.read_bytes(COMMIT)
    try:
        commit = _COMMIT.validate_json(content)
    except ValidationError as error:
        why = f"not a commit of this format ({error.error_count()} faults)"
        raise Damaged(at.url_of(COMMIT), why, dcp.WAY_OUT) from None
    stated = json.loads(content)
    if stated.pop("sha256", None) not in (None, _digest(stated)):
        why = "damaged checkpoint: it does not match its checksum"
        raise Damaged(at.url_of(COMMIT), why, dcp.WAY_OUT)
    _must_be_whole(at, commit)
    return commit


def _must_be_whole(folder: Folder, commit: Commit) -> None:
    there = folder.sizes()
    for name, size in commit.files.items():
        found = there.get(name)
        if found != size:
            why = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise Damaged(folder.url_of(name), f"damaged checkpoint: the file {why}", dcp.WAY_OUT)


def _must_match(folder: Folder, entries: dict[str, dcp.Entry], tensors: dict[str, Tensor]) -> None:
    held = {key: f"{entry.dtype}{list(entry.shape)}" for key, entry in entries.items()}
    wanted = {key: f"{dcp.NAMES[t.dtype]}{list(t.shape)}" for key, t in tensors.items()}
    faults = [f"{key} is not in the checkpoint" for key in wanted.keys() - held.keys()]
    faults += [f"{key} is only in the checkpoint" for key in held.keys() - wanted.keys()]
    faults += [
        f"{key} is {held[key]} in the checkpoint and {wanted[key]} in the model"
        for key in wanted.keys() & held.keys()
        if held[key] != wanted[key]
    ]
    if faults:
        more = f" and {len(faults) - FAULTS} more" if len(faults) > FAULTS else ""
        why = f"the checkpoint is of another model: {'; '.join(sorted(faults)[:FAULTS])}{more}"
        raise DataError(folder.url, why, "Resume with the configuration it was made with")


def _digest(commit: dict[str, Any]) -> str:
    """The sha256 of a commit without its own entry."""
    return hashlib.sha256(json.dumps(commit).encode()).hexdigest()


def _attempt(action: Callable[[], None]) -> str | None:
    """Try once, and again after each pause; why the last attempt failed, None if one succeeded."""
    failure = None
    for pause in (0.0, *PAUSES_S):
        time.sleep(pause)
        try:
            action()
        except Exception as error:
            failure = _reason(error)
        else:
            return None
    return failure


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Problem) else scrub(f"{type(error).__name__}: {error}")
