"""What every damaged input must come to: the result of a sound one, or one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infra.command import explain
from pipelines.models import DATA_ERRORS

EXPECTED = (2, 3, 4)  # configuration, data, infrastructure


def judge(read: Callable[[], Any], *names: str) -> Any:
    """What `read` returns, or None where it refuses as it should.

    names: of which the message of a refusal has to hold one.
    """
    try:
        return read()
    except BaseException as failure:  # what a Rust library panics with is no Exception
        message, code = explain(failure, DATA_ERRORS)
        cause = failure
    if code not in EXPECTED:
        raise AssertionError(f"{type(cause).__name__}: {message[:500]}") from cause
    assert not names or any(name in message for name in names), message[:500]
    assert "Traceback" not in message
    return None
