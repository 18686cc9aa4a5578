"""Processes that meet at a database nobody has made yet."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPEN = """
import sys
from infra.tracking import connect

client = connect(sys.argv[1])
client.create_run(client.create_experiment(sys.argv[2]))
client.search_registered_models()
"""


def opening(database: Path, experiment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, f"sqlite:///{database}", experiment]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_database_is_made_once_and_whole(tmp_path: Path) -> None:
    """One process dies while it makes the tables; then three come at the same moment."""
    database = tmp_path / "runs" / "mlflow.db"
    half_made = database.with_name("mlflow.db.new")
    killed = opening(database, "killed")
    while not half_made.exists() or not half_made.stat().st_size:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not database.exists()

    together = [opening(database, f"experiment {nth}") for nth in range(3)]
    said = [process.communicate()[1] for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], said
    assert sum("Creating initial MLflow database tables" in text for text in said) == 1

    from infra.tracking import connect

    found = connect(f"sqlite:///{database}").search_experiments()
    assert {e.name for e in found} == {"Default", *(f"experiment {nth}" for nth in range(3))}
    assert sorted(p.name for p in database.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
