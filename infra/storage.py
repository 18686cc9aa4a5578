"""Files on a disk, in a bucket or in memory, through one class: `Folder`.

A folder is an fsspec filesystem and a path in it. Every failure is one `Problem` that names the
place and what to do, and shows no credential.
"""

from __future__ import annotations

import errno
import glob
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.core import url_to_fs

from infra.credentials import refuse_credentials, scrub
from infra.errors import ConfigError, DataError, InfraError, Problem, nearest

if TYPE_CHECKING:
    import pyarrow.fs

# The client repeats each request to an object store, after waits that double up to 20 s: some 15 s
# in all. A short outage is survived, and a wrong address is reported soon.
ATTEMPTS = 6
READS = 2  # attempts at a body that breaks off, which the client's own attempts do not cover
CONNECT_S, ANSWER_S = 5, 15  # how long an attempt waits for a connection, and for the next byte
PARTIAL = ".partial"  # ends the name of a file that is still being written

T = TypeVar("T")

# For everything that opens an S3 URL through fsspec in this process, `Folder` or not.
fsspec.config.conf.setdefault("s3", {}).setdefault(
    "config_kwargs",
    {
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        "connect_timeout": CONNECT_S,
        "read_timeout": ANSWER_S,
    },
)


@dataclass(frozen=True)
class Folder:
    """A folder on any filesystem; it can be pickled and sent to workers.

    Names are relative to the folder and may hold slashes. Every method raises DataError for a file
    that does not exist and InfraError if the machine, the network or the store refuses.
    """

    filesystem: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def at(cls, url: str | Folder) -> Folder:
        """The folder at a local path or an fsspec URL; it need not exist yet."""
        if isinstance(url, Folder):
            return url
        refuse_credentials(url, scrub(url))
        try:
            if "://" in url:
                urlsplit(url)
        except ValueError as error:
            raise ConfigError(
                scrub(url), f"not a URL ({error})", "Write scheme://host/path"
            ) from None
        try:
            folder = cls(*url_to_fs(url))
        except ValueError:  # fsspec's answer to a protocol it does not know
            protocol = url.partition("://")[0]
            known = nearest(protocol, fsspec.available_protocols())
            hint = f"Did you mean {known}://?" if known else "Use a local path or s3://"
            raise ConfigError(scrub(url), f"unknown protocol {protocol}://", hint) from None
        except ImportError as error:
            raise ConfigError(
                scrub(url), f"its filesystem is not installed ({error})", "Install that package"
            ) from None
        if folder.is_s3:
            folder.filesystem.retries = READS
        return folder

    @classmethod
    def holding(cls, url: str) -> tuple[Folder, str]:
        """The folder that holds the file at `url`, and the file's name."""
        folder = cls.at(url)
        parent, _, name = folder.path.rpartition("/")
        return cls(folder.filesystem, parent), name

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, self._path(name))

    @property
    def url(self) -> str:
        """The folder's address, which `at` opens again; `at` takes none that holds a credential."""
        return self.path if self.is_local else self.filesystem.unstrip_protocol(self.path)

    @property
    def is_local(self) -> bool:
        return self._speaks("file")

    @property
    def is_s3(self) -> bool:
        return self._speaks("s3")

    def url_of(self, name: str) -> str:
        return (self / name).url

    def exists(self, name: str = "") -> bool:
        return self._ask(name, self.filesystem.exists)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._ask(name, self.filesystem.size)

    def names(self) -> list[str]:
        """Sorted names of what lies directly in the folder; [] if there is no folder."""
        return sorted(self._listed())

    def files(self) -> list[str]:
        """Sorted names of the files that lie directly in the folder."""
        return sorted(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that lies directly in the folder, by name."""
        return {
            name: info["size"] or 0
            for name, info in self._listed().items()
            if not _is_directory(info)
        }

    def _listed(self) -> dict[str, dict[str, Any]]:
        """What the filesystem says of all that lies directly in the folder, by name."""

        def listed(path: str) -> list[dict[str, Any]]:
            while True:
                try:
                    return self.filesystem.ls(path, detail=True)
                except FileNotFoundError:
                    if not (self.is_local and os.path.isdir(path)):
                        return []
                    # A file was removed while the list was made: list again.

        own = self.path.strip("/")  # some stores list the folder in itself
        found = {info["name"].strip("/"): info for info in self._ask("", listed)}
        return {
            path.rpartition("/")[2]: info
            for path, info in found.items()
            if path != own and not path.endswith(PARTIAL)
        }

    def read_bytes(self, name: str) -> bytes:
        return self._ask(name, self.filesystem.cat_file)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [start, stop) of a file, for each range; less than asked beyond its end."""
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]

        def read(path: str) -> list[bytes]:
            paths = [path] * len(ranges)
            return self.filesystem.cat_ranges(paths, starts, stops, on_error="raise")

        return self._ask(name, read)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file atomically: readers see the old content or the new one."""

        def write(path: str) -> None:
            if not self.is_local:
                self.filesystem.pipe_file(path, content)
                return
            with _replacing(path) as file:
                file.write(content)

        self._ask(name, write)

    def require_writable(self, name: str) -> None:
        """InfraError where a file on a disk could not be written; a store is not asked. What is
        there stays as it is."""
        if not self.is_local:
            return
        path = Path(self._path(name))
        with explained(self.url_of(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError("a folder has this name")
            tempfile.TemporaryFile(dir=path.parent).close()

    def require_removable(self) -> None:
        """InfraError where this process works in the folder or below; a store is not asked."""
        with suppress(FileNotFoundError):  # where this process works in a folder that is gone
            if self.is_local and Path.cwd().is_relative_to(Path(self.path).resolve()):
                why = "it cannot be removed, as this process works in it"
                raise InfraError(self.url, why, "Leave it, then run the same command again")

    @contextmanager
    def open(self, name: str, mode: str = "rb") -> Iterator[IO[bytes]]:
        """A file to stream. In mode "wb" it appears only when the block ends without error."""
        if mode not in ("rb", "wb"):
            raise ValueError(f"mode is 'rb' or 'wb', not {mode!r}")
        path = self._path(name)
        with explained(self.url_of(name)):
            if mode == "rb":
                context = self.filesystem.open(path, "rb")
            elif self.is_local:
                context = _replacing(path)
            else:
                context = _committing(self.filesystem, path)
            with context as file:
                yield file

    def remove(self, name: str = "") -> None:
        """Remove a file, or a folder and all it holds; nothing if it does not exist."""
        (self / name if name else self).require_removable()

        def gone(path: str) -> None:
            with suppress(FileNotFoundError):
                # Stores take the path for a pattern, disks do not.
                self.filesystem.rm(path if self.is_local else glob.escape(path), recursive=True)

        self._ask(name, gone)

    def remove_partial(self) -> None:
        """Remove what killed writers have left directly in the folder, which `names` hides. Only
        disks keep such files; a live writer's would go as well."""
        if self.is_local:
            with explained(self.url):
                for left in Path(self.path).glob(f"*{PARTIAL}"):
                    left.unlink(missing_ok=True)

    @contextmanager
    def local(self, *names: str) -> Iterator[Path]:
        """The folder on this machine's disk: itself, or a copy for the duration of the block.

        names: the files that are needed, by default all that lie directly in the folder. Where the
        address is that of a file, it is the file. A copy has the own name of either.
        """
        if self.is_local:
            yield Path(self.path)
            return
        with tempfile.TemporaryDirectory() as staging:
            copy = Path(staging) / self.path.rstrip("/").rpartition("/")[2]
            if needed := names or self.files():
                copy.mkdir(exist_ok=True)  # the root of a store has no name
                for name in needed:
                    (copy / name).write_bytes(self.read_bytes(name))
            else:
                copy.write_bytes(self.read_bytes(""))
            yield copy

    def arrow_filesystem(self) -> pyarrow.fs.FileSystem:
        """The same filesystem for pyarrow: pyarrow's own for disks and S3, else fsspec's."""
        from pyarrow import fs

        if self.is_local:
            return fs.LocalFileSystem()
        if not self.is_s3:
            return fs.PyFileSystem(fs.FSSpecHandler(self.filesystem))
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        # An endpoint needs no region, but without one the SDK asks the metadata service.
        region = region or ("us-east-1" if endpoint else None)
        return _arrow_s3(endpoint, region)

    def _path(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def _speaks(self, protocol: str) -> bool:
        known = self.filesystem.protocol
        return protocol in ((known,) if isinstance(known, str) else known)

    def _ask(self, name: str, ask: Callable[[str], T]) -> T:
        with explained(self.url_of(name) if name else self.url):
            self.filesystem.invalidate_cache()  # another process may have written
            return ask(self._path(name))


def _is_directory(info: dict[str, Any]) -> bool:
    """Whether what a filesystem lists is a folder; fsspec does not say so of a link to one."""
    leads_to_one = info.get("islink", False) and os.path.isdir(info["name"])
    return leads_to_one or info["type"] == "directory"


@lru_cache(maxsize=8)
def _arrow_s3(endpoint: str | None, region: str | None) -> pyarrow.fs.S3FileSystem:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    return S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        connect_timeout=CONNECT_S,
        request_timeout=ANSWER_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A local file that gets its name only when it is complete and on the disk."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)  # so that the rename survives a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _committing(filesystem: fsspec.AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    """An object whose upload is completed only when the block ends without error."""
    file = filesystem.open(path, "wb", autocommit=False)
    try:
        yield file
        file.close()
        file.commit()
    except BaseException:
        file.closed = True  # or the garbage collector would flush what is left
        with suppress(Exception):  # if it fails, the upload is still not completed
            file.discard()
        raise


class _Cause(NamedTuple):
    problem: type[Problem]
    why: str
    fix: str
    kinds: str  # class names: botocore need not be imported for its errors to be recognised
    errnos: tuple[int, ...] = ()
    words: tuple[str, ...] = ()  # of pyarrow, which has one class for all errors of S3


_CAUSES = (
    _Cause(DataError, "not found", "Check the spelling, or run the step that makes it",
           "FileNotFoundError"),
    _Cause(InfraError, "a file is where a folder should be", "Choose another folder",
           "NotADirectoryError FileExistsError"),
    _Cause(InfraError, "access denied",
           "Check the owner and mode of the folder, or what the bucket's policy grants",
           "PermissionError", (errno.EROFS,), ("AWS Error ACCESS_DENIED",)),
    _Cause(InfraError, "no usable credentials",
           "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
           "or give the node a role",
           "NoCredentialsError PartialCredentialsError CredentialRetrievalError"
           " TokenRetrievalError UnauthorizedSSOTokenError ProfileNotFound"),
    _Cause(InfraError, "the disk is full",
           "Free some space or use another disk; what was complete before still stands",
           "", (errno.ENOSPC, errno.EDQUOT)),
    _Cause(InfraError, "the store does not answer",
           "Check the network, the bucket's region and AWS_ENDPOINT_URL",
           "ConnectionError TimeoutError HTTPClientError ClientConnectionError gaierror"
           " ClientPayloadError IncompleteRead",
           (errno.EBUSY, errno.EREMOTEIO, errno.EHOSTUNREACH, errno.ENETUNREACH),
           ("AWS Error NETWORK_CONNECTION", "AWS Error SLOW_DOWN", "(HTTP status 5")),
)  # fmt: skip


def _fits(error: BaseException, cause: _Cause) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return (
        not kinds.isdisjoint(cause.kinds.split())
        or getattr(error, "errno", None) in cause.errnos
        or any(word in str(error) for word in cause.words)
    )


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what a filesystem raises inside the block into one Problem about `where`."""
    try:
        yield
    except Problem:
        raise
    except Exception as error:
        # The original error first: fsspec says "not found" where an HTTP server does not answer.
        told = [known for known in (error.__cause__, error) if known]
        cause = next((cause for known in told for cause in _CAUSES if _fits(known, cause)), None)
        if cause:
            raise cause.problem(where, cause.why, cause.fix) from None
        if not isinstance(error, OSError):
            raise
        raise InfraError(where, scrub(f"{type(error).__name__}: {error}")) from None
