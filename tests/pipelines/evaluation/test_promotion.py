"""The alias moves only where it is as it was when the models were compared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from infra.registry import ModelVersion
from pipelines.evaluation import promotion

FIRST, SECOND, OTHER = (ModelVersion(name="m", version=n, run_id=None) for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("compared", "now", "accepted", "moved", "set_to"),
    [
        (None, None, True, True, [SECOND.uri]),
        (FIRST, FIRST, True, True, [SECOND.uri]),
        # An earlier attempt was cut off behind the alias.
        (FIRST, SECOND, True, True, []),
        # Another evaluation was quicker, or somebody has taken the alias away.
        (FIRST, OTHER, True, False, []),
        (FIRST, None, True, False, []),
        (None, OTHER, True, False, []),
        (FIRST, FIRST, False, False, []),
    ],
)
def test_an_alias_that_has_moved_meanwhile_stays(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compared: ModelVersion | None,
    now: ModelVersion | None,
    accepted: bool,
    moved: bool,
    set_to: list[str],
) -> None:
    done: list[str] = []
    monkeypatch.setattr(promotion.registry, "tag", lambda *given: None)
    monkeypatch.setattr(promotion.registry, "get_alias", lambda *given: now)
    monkeypatch.setattr(promotion.registry, "set_alias", lambda to, *given: done.append(to))
    origins = {"a": {"name": "m", "version": SECOND.uri}}
    if compared:
        origins["champion"] = {"name": "m", "version": compared.uri}
    config: Any = SimpleNamespace(gate=SimpleNamespace(model="a"))
    decision: Any = SimpleNamespace(accepted=accepted, why="because")
    handle: Any = SimpleNamespace(run_id="r", uri="")
    found = promotion.conclude(config, origins, decision, handle, "report.html")
    assert found == {"champion": {"moved": moved, "why": "because"}}
    assert done == set_to
    assert ("evaluate again" in capsys.readouterr().err) == (accepted and not moved)
