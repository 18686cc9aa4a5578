"""The processes of this machine, told apart for longer than their numbers do."""

from __future__ import annotations

import subprocess
from pathlib import Path


def started(pid: object) -> str | None:
    """When a process was started, as a word that no other process of its number has; None if it
    is gone or a zombie.

    The word is the kernel's count of clock ticks since the boot. What `ps` shows is asked for only
    where there is no /proc: it changes when somebody sets the clock.
    """
    if not Path("/proc/self/stat").exists():
        return _shown(pid)
    try:
        # The kernel cuts long names, inside a letter, too.
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _shown(pid: object) -> str | None:
    columns = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    state, _, began = subprocess.run(columns, capture_output=True, text=True).stdout.partition(" ")
    return None if state.startswith("Z") else began.strip() or None
