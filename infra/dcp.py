"""The files of a sharded checkpoint: torch's DCP planners over safetensors and JSON.

DCP decides which rank writes and reads which chunk of which tensor, so a checkpoint loads into any
other sharding. DCP's own files are pickles, which could execute code. Here each rank writes one
safetensors file instead, and an `Entry` per tensor says which file holds which chunk, and with what
checksum. Chunks are read whole, and their checksums are verified.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from infra import documents
from infra.errors import DataError
from infra.storage import Folder

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A rank that needs a part of a chunk reads all of it, to verify its checksum. So chunks are small.
CHUNK_BYTES = 1 << 24
READ_AT_ONCE = 32  # chunks that are requested together, as a bucket answers each one late
WAY_OUT = (
    "Remove the folder of this step, or have damaged checkpoints skipped (corrupt=skip), "
    "to go back to the checkpoint before it"
)


class Damaged(DataError):
    """A file of a checkpoint is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor, at `offset` in it, and the file that holds it.

    `sha256` is of its bytes; empty in checkpoints from before there were checksums.
    """

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    sha256: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def lies_in(self, shape: tuple[int, ...]) -> bool:
        if not len(self.offset) == len(self.shape) == len(shape):
            return False
        sides = zip(self.offset, self.shape, shape, strict=True)
        return all(0 <= begin <= begin + size <= whole for begin, size, whole in sides)

    def overlaps(self, other: Chunk) -> bool:
        """Whether two boxes of one tensor share an element."""
        return all(
            max(at) < min(at[0] + self.shape[dim], at[1] + other.shape[dim])
            for dim, at in enumerate(zip(self.offset, other.offset, strict=True))
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A whole tensor: the safetensors name of its dtype, its global shape, its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        covered = sum(chunk.numel for chunk in self.chunks)
        inside = all(chunk.lies_in(self.shape) for chunk in self.chunks)
        if self.dtype not in DTYPES or not inside or covered != math.prod(self.shape):
            raise ValueError("unknown dtype, or chunks that do not make up the whole")
        # FSDP cuts along the first dimension, so only neighbours in this order could overlap.
        ordered = sorted(self.chunks, key=lambda chunk: chunk.offset)
        if any(one.overlaps(other) for one, other in pairwise(ordered)):
            raise ValueError("chunks that overlap")


@dataclass(kw_only=True)
class Staged:
    """A checkpoint to be written: this rank's tensors on the CPU, and on rank 0 the index of all.

    After `write`, `digests` holds the sha256 of each of this rank's chunks.
    """

    file: str = ""
    header: bytes = b""
    pieces: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of the file of each rank

    def write(self, folder: Folder) -> None:
        """Write this rank's file; it appears under its name only when it is whole."""
        if not self.pieces:
            return
        with folder.open(self.file, "wb") as file:
            file.write(self.header)
            for key, piece in self.pieces.items():
                content = piece.reshape(-1).view(torch.uint8).numpy()
                file.write(content)
                self.digests[key] = hashlib.sha256(content).hexdigest()

    def index(self, digests: Mapping[str, str]) -> dict[str, Entry]:
        """The entries with all ranks' digests; on rank 0."""
        return {
            key: replace(
                entry,
                chunks=tuple(replace(c, sha256=digests[_key(key, c)]) for c in entry.chunks),
            )
            for key, entry in self.entries.items()
        }


def stage(tensors: dict[str, Tensor]) -> Staged:
    """Plan a checkpoint with all ranks and copy this rank's chunks to the CPU; collective."""
    if others := [key for key, tensor in tensors.items() if not isinstance(tensor, Tensor)]:
        raise TypeError(f"not tensors, so they belong into the meta data: {others}")
    writer = _Writer()
    with warnings.catch_warnings(action="ignore"):  # DCP warns where there is a single process
        torch_dcp.save(
            tensors,
            storage_writer=writer,
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=not dist.is_initialized(),
        )
    return writer.staged


def read(
    folder: Folder, entries: dict[str, Entry], tensors: dict[str, Tensor], *, alone: bool
) -> None:
    """Fill `tensors`, however sharded, from a checkpoint's files; Damaged if one is not as written.

    alone: this process reads by itself; otherwise all ranks call together, and all raise.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            torch_dcp.load(
                tensors,
                storage_reader=_Reader(folder, entries),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=alone or not dist.is_initialized(),
            )
    except CheckpointException as failed:  # DCP's bundle of what went wrong on which rank
        raise next(iter(failed.failures.values()))[0] from None


class _Writer(StorageWriter):
    """Collects what DCP's planner assigns to this rank; `Staged.write` writes it."""

    def __init__(self) -> None:
        self.staged = Staged()

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # Every attempt has file names of its own, so the files of a killed attempt are never taken
        # for this one's, and those of a committed checkpoint are never overwritten.
        attempt = uuid.uuid4().hex[:8]
        return [
            replace(plan, storage_data=f"{attempt}-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        staged, header, results, end = self.staged, {}, [], 0
        staged.file = plan.storage_data
        for item in plan.items:
            part = planner.resolve_data(item).detach()
            part = torch.empty(part.shape, dtype=part.dtype).copy_(part)
            offset = tuple(item.index.offset or (0,) * part.dim())
            for piece in _pieces(part):
                begin, end = end, end + piece.nbytes
                chunk = Chunk(file=staged.file, offset=offset, shape=tuple(piece.shape))
                key = _key(item.index.fqn, chunk)
                header[key] = {
                    "dtype": NAMES[piece.dtype],
                    "shape": chunk.shape,
                    "data_offsets": (begin, end),
                }
                staged.pieces[key] = piece
                results.append(WriteResult(item.index, piece.nbytes, chunk))
                offset = (offset[0] + len(piece), *offset[1:]) if offset else offset
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        staged.header = len(text).to_bytes(8, "little") + text
        return _done((results, len(staged.header) + end))

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        chunks = defaultdict(list)
        for written, size in results:
            for result in written:
                chunks[result.index.fqn].append(result.storage_data)
                self.staged.sizes[result.storage_data.file] = size
        for key, tensor in metadata.state_dict_metadata.items():
            self.staged.entries[key] = Entry(
                dtype=NAMES[tensor.properties.dtype],
                shape=tuple(tensor.size),
                chunks=tuple(chunks[key]),
            )


class _Reader(StorageReader):
    def __init__(self, folder: Folder, entries: dict[str, Entry]) -> None:
        self.folder, self.entries = folder, entries

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[entry.dtype]),
                    torch.Size(entry.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
                        for chunk in entry.chunks
                    ],
                )
                for key, entry in self.entries.items()
            }
        )

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._chunk(item.storage_index).file].append(item)
        for name, items in by_file.items():
            shard = _ShardFile(self.folder, name)
            for at in range(0, len(items), READ_AT_ONCE):
                self._read(shard, items[at : at + READ_AT_ONCE], planner)
        return _done(None)

    def _read(self, shard: _ShardFile, items: list[ReadItem], planner: LoadPlanner) -> None:
        """Fill parts of some tensors with what some chunks of one file hold of them."""
        chunks = [
            (item.storage_index.fqn, self.entries[item.storage_index.fqn].dtype,
             self._chunk(item.storage_index))
            for item in items
        ]  # fmt: skip
        for item, part in zip(items, shard.read(chunks), strict=True):
            for dim in range(part.dim()):
                part = part.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)

    def _chunk(self, index: MetadataIndex) -> Chunk:
        chunks = self.entries[index.fqn].chunks
        return next(c for c in chunks if index.offset is None or c.offset == tuple(index.offset))


class _ShardFile:
    """A safetensors file of which only the chunks that are asked for are read."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        size = folder.size(name)
        (prefix,) = folder.read_ranges(name, [(0, 8)])
        self.start = 8 + int.from_bytes(prefix, "little")
        try:
            if self.start > size:
                raise ValueError("header longer than the file")
            self.header = documents.from_json(folder.read_ranges(name, [(8, self.start)])[0])
            held = [entry for key, entry in self.header.items() if key != "__metadata__"]
            spans = sorted(tuple(entry["data_offsets"]) for entry in held)
            if [*(begin for begin, _ in spans), size - self.start] != [0, *(e for _, e in spans)]:
                raise ValueError("its tensors do not make up the file")
        except (ValueError, TypeError, LookupError, AttributeError):
            raise self._damaged("it is not a safetensors file") from None

    def read(self, chunks: list[tuple[str, str, Chunk]]) -> list[Tensor]:
        """The tensors of some (name, dtype, chunk), checked against the chunks' checksums."""
        ranges = [self._range(*chunk) for chunk in chunks]
        contents = self.folder.read_ranges(self.name, ranges)
        return [self._tensor(*c, content) for c, content in zip(chunks, contents, strict=True)]

    def _range(self, key: str, dtype: str, chunk: Chunk) -> tuple[int, int]:
        try:
            held = self.header[_key(key, chunk)]
            begin, end = map(int, held["data_offsets"])
            form = (held["dtype"], tuple(held["shape"]), end - begin)
            fits = begin >= 0 and form == (dtype, chunk.shape, chunk.numel * DTYPES[dtype].itemsize)
        except (LookupError, TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise self._damaged(f"it does not hold {_key(key, chunk)} as the commit says")
        return self.start + begin, self.start + end

    def _tensor(self, key: str, dtype: str, chunk: Chunk, content: bytes) -> Tensor:
        if len(content) != chunk.numel * DTYPES[dtype].itemsize:
            raise self._damaged(f"it ends inside {_key(key, chunk)}")
        if chunk.sha256 not in ("", hashlib.sha256(content).hexdigest()):
            raise self._damaged(f"the numbers of {_key(key, chunk)} do not match their checksum")
        if not content:
            return torch.empty(chunk.shape, dtype=DTYPES[dtype])
        return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).view(chunk.shape)

    def _damaged(self, why: str) -> Damaged:
        return Damaged(self.folder.url_of(self.name), f"damaged checkpoint: {why}", WAY_OUT)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor in rows of at most CHUNK_BYTES."""
    if not tensor.dim():
        return (tensor,)
    return tensor.split(max(1, CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes)))


def _key(key: str, chunk: Chunk) -> str:
    return f"{key}[{','.join(map(str, chunk.offset))}]"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
