from __future__ import annotations

import errno
import os
import pickle
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra import storage
from infra.credentials import refuse_credentials, scrub
from infra.errors import ConfigError, DataError, InfraError, Problem
from infra.storage import Folder, explained


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    root = str(tmp_path) if request.param == "disk" else "memory:/"
    folder = Folder.at(f"{root}/new/[folder]*")  # not a pattern, just a name
    yield folder
    folder.remove()


def test_a_folder_keeps_files(folder: Folder) -> None:
    assert folder.names() == []
    assert not folder.exists("a")
    folder.write_bytes("a", b"one")
    folder.write_bytes("a", b"three")
    (folder / "sub").write_bytes("sub", b"")
    (folder / "subway").write_bytes("b", b"")
    assert folder.read_bytes("a") == b"three"
    assert folder.size("a") == 5
    assert folder.exists("sub/sub")
    assert folder.names() == ["a", "sub", "subway"]
    assert folder.sizes() == {"a": 5}
    assert (folder / "sub").names() == ["sub"]
    assert folder.read_ranges("a", [(1, 3), (0, 1), (2, 2), (4, 9)]) == [b"hr", b"t", b"", b"e"]
    folder.remove("sub")
    folder.remove("sub")
    assert folder.names() == ["a", "subway"]
    assert Folder.at(folder.url) == folder
    assert Folder.holding(folder.url_of("a")) == (folder, "a")


def test_a_link_is_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere, here = Folder.at(str(tmp_path / "elsewhere")), tmp_path / "here"
    elsewhere.write_bytes("sub/a", b"three")
    here.mkdir()
    (here / "file").symlink_to(tmp_path / "elsewhere/sub/a")
    (here / "folder").symlink_to(tmp_path / "elsewhere/sub")
    (here / "nowhere").symlink_to(tmp_path / "gone")
    folder = Folder.at(str(here))
    assert folder.names() == ["file", "folder", "nowhere"]
    assert folder.files() == ["file", "nowhere"]
    assert folder.sizes() == {"file": 5, "nowhere": 0}
    folder.remove("folder")
    assert elsewhere.read_bytes("sub/a") == b"three"


def test_a_stream_appears_when_it_is_whole(folder: Folder) -> None:
    with folder.open("big", "wb") as file:
        file.write(b"x" * 10)
        file.write(b"y")
    with folder.open("big") as file:
        assert file.read() == b"x" * 10 + b"y"


def test_a_copy_on_this_machine(folder: Folder) -> None:
    for name in ("a", "b"):
        folder.write_bytes(name, name.encode())
    (folder / "sub").write_bytes("c", b"c")
    assert folder.files() == ["a", "b"]
    for asked in ((), ("a",)):
        with folder.local(*asked) as place:
            assert place.name == "[folder]*"
            assert (place / "a").read_bytes() == b"a"
            assert folder.is_local or len(list(place.iterdir())) == len(asked or "ab")
        assert place.exists() == folder.is_local


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    folder.write_bytes("a", b"old")
    with suppress(ZeroDivisionError), folder.open("a", "wb") as file:
        file.write(b"new")
        _ = 1 / 0
    assert folder.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves the old file or the new one, and what was said to be written stays."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    Folder.at(str(tmp_path)).write_bytes("a", b"new")
    assert done == ["file", "name", "folder"]


def test_what_another_process_has_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filesystems of stores keep lists of what they have seen: each question forgets them first."""
    folder, done = Folder.at("memory://cached"), []
    kind = type(folder.filesystem)
    monkeypatch.setattr(kind, "invalidate_cache", lambda *_: done.append("forgotten"))
    for name, ask in (("ls", folder.names), ("exists", lambda: folder.exists("a"))):
        monkeypatch.setattr(kind, name, lambda *_, name=name, **__: done.append(name) or [])
        ask()
    assert done == ["forgotten", "ls", "forgotten", "exists"]


def test_names_hide_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / f".a.0123{storage.PARTIAL}").write_bytes(b"half")
    assert Folder.at(str(tmp_path)).names() == []


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(str(tmp_path))
    folder.write_bytes("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfraError, match="disk is full"):
        folder.write_bytes("a", b"new")
    assert folder.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_this_process_works_in_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.at(str(tmp_path / "run"))
    (folder / "sub").write_bytes("a", b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for place in ("run", "run/sub"):
        monkeypatch.chdir(tmp_path / place)
        for taken in (folder, Folder.at(str(tmp_path / "link"))):
            with pytest.raises(InfraError, match="as this process works in it"):
                taken.remove()
        assert folder.exists("sub/a")
        Folder.at(str(tmp_path)).remove("other")
    folder.remove("sub/a")
    assert (folder / "sub").names() == []


def test_what_is_missing_is_named(folder: Folder) -> None:
    for ask in (folder.read_bytes, folder.size):
        with pytest.raises(DataError, match="nowhere: not found"):
            ask("nowhere")
    with pytest.raises(DataError, match="nowhere: not found"), folder.open("nowhere"):
        pass


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Problem, match="file/a"):
        Folder.at(str(tmp_path / "file")).write_bytes("a", b"")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket", "unknown protocol s4://"),
        ("memori://x", "Did you mean memory://"),
        ("s3://name:secret@bucket/x", "holds a credential"),
        ("http://[x", "not a URL"),
    ],
)
def test_a_wrong_url_is_a_config_error(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Folder.at(url)
    assert "secret" not in str(caught.value)


class NoCredentialsError(Exception):
    """Stands for botocore's, which is recognised by its name."""


@pytest.mark.parametrize(
    ("error", "problem", "why"),
    [
        (PermissionError("no"), InfraError, "access denied"),
        (OSError(errno.EROFS, "read-only"), InfraError, "access denied"),
        (OSError(errno.EDQUOT, "quota"), InfraError, "disk is full"),
        (ConnectionResetError("gone"), InfraError, "does not answer"),
        (TimeoutError("slow"), InfraError, "does not answer"),
        (NoCredentialsError(), InfraError, "no usable credentials"),
        (OSError("AWS Error UNKNOWN (HTTP status 503)"), InfraError, "does not answer"),
        (OSError("AWS Error ACCESS_DENIED during GetObject"), InfraError, "access denied"),
        (OSError(errno.EIO, "odd"), InfraError, "odd"),
    ],
)
def test_causes(error: Exception, problem: type[Problem], why: str) -> None:
    with pytest.raises(problem, match=why) as caught, explained("s3://bucket/key"):
        raise error
    assert caught.value.where == "s3://bucket/key"


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(KeyError), explained("here"):
        raise KeyError


def test_no_credential_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    told = "hunter2 GET https://me:pass@host/key?X-Amz-Signature=abc&b=c failed"
    assert scrub(told) == "… GET https://host/key?… failed"
    with pytest.raises(InfraError) as caught, explained("x"):
        raise OSError(told)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "text", ["a://" + 16_000 * "?key", "a://?" + 20_000 * "key", "a://" + 64_000 * "?"]
)
def test_a_long_text_is_searched_for_credentials_in_one_pass(text: str) -> None:
    """It would take very long if every start were tried with every end."""
    refuse_credentials(text, "here")
    assert scrub(text) == text
    with pytest.raises(ConfigError, match="holds a credential"):
        refuse_credentials(f"{text}key=", "here")
    assert scrub(f"{text} ?a=b") == f"{text} ?…"


def test_an_address_opens_though_it_holds_the_value_of_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a test server's key is `test` and the folder is /tmp/tests."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", tmp_path.name)
    Folder.at(str(tmp_path)).write_bytes("run.json", b"{}")
    assert Folder.at(Folder.at(str(tmp_path)).url).read_bytes("run.json") == b"{}"
    assert Folder.at("https://host/x?version=3").url == "https://host/x?version=3"


def test_a_folder_travels(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    assert pickle.loads(pickle.dumps(folder)) == folder
