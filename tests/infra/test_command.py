"""The harness of the verbs: flags, the JSON line, exit codes, and errors out of Ray's wrappers."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import yaml

from infra import command
from infra.errors import ConfigError, DataError, InfraError, Problem


@dataclass(frozen=True, kw_only=True)
class Constant:
    kind: Literal["constant"] = "constant"
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Cosine:
    kind: Literal["cosine"] = "cosine"
    rate: float


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str = "text"
    steps: int = 5


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    schedule: Constant | Cosine = Constant()


class WeightsError(ValueError):
    """Stands for an error class of another room."""


def run(
    *argv: str,
    execute: Callable[[Any], dict[str, Any]] = vars,
    presets: Path = Path("nowhere"),
    config_type: type[Any] = Config,
) -> int:
    return command.run(
        "finetune",
        config_type,
        plan=lambda config: {"steps": config.steps, "tokens": config.steps * 2048},
        execute=execute,
        verbs=("finetune",),
        presets=presets,
        doc="Fine-tune something.",
        argv=argv,
        data_errors=(WeightsError,),
    )


def raises(error: BaseException) -> Callable[[Config], dict[str, Any]]:
    def execute(config: Config) -> dict[str, Any]:
        raise error

    return execute


def test_the_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    def execute(config: Config) -> dict[str, Any]:
        sys.stdout.write("step 1\n")
        return {"loss": float("nan"), "path": Path("out"), "by": {"a": (1, float("inf"))}}

    assert run(execute=execute) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == {"loss": None, "path": "out", "by": {"a": [1, None]}}


def test_dry_run_plans_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("steps=1000", "--dry-run", execute=raises(AssertionError())) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["steps   1,000", "tokens  2,048,000"]
    assert json.loads(out[-1]) == {"steps": 1000, "tokens": 2048000}


def test_print_config_prints_a_preset(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("steps=7", "--print-config", execute=raises(AssertionError())) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == {"finetune": {"source": "text", "steps": 7}}
    (tmp_path / "mine.yaml").write_text(text)
    assert run("mine", presets=tmp_path) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7


def test_help_lists_fields_presets_and_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "quickstart.yaml").write_text("finetune: {steps: 7}")
    assert run("--help", "not=valid", presets=tmp_path) == 0
    out = capsys.readouterr().out
    for text in ("Fine-tune something.", "steps   int = 5", "quickstart", *command.FLAGS):
        assert text in out


def test_help_offers_presets_for_this_verb_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "other.yaml").write_text("sweep: {}")
    assert run("--help", presets=tmp_path) == 0
    assert "; PRESET is a .yaml or a URL\n" in capsys.readouterr().out
    (tmp_path / "small.yaml").write_text("finetune:")
    assert run("--help", presets=tmp_path) == 0
    assert "; PRESET is one of small, a .yaml or a URL\n" in capsys.readouterr().out


def test_help_shows_a_key_for_each_kind_that_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help", config_type=Scheduled) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "schedule       constant | cosine = constant",
        "schedule.rate  float (constant) = 0.5",
        "schedule.rate  float (cosine) = required",
    ]


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'ray', 'mlflow', 'torch', 'pydantic', 'fsspec', 's3fs', 'pyarrow'}"
    code = f"import sys, infra.command; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("steps", "too many", "Use fewer"), 2, "steps: too many. Use fewer\n"),
        (DataError("part-0.parquet", "truncated"), 3, "part-0.parquet: truncated\n"),
        (WeightsError("config.json: missing key"), 3, "config.json: missing key\n"),
        (InfraError("s3://b", "gone"), 4, "s3://b: gone\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 4,
         "/x: No space left on device. free some space, then run the same command again"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 4, "/x: Permission denied."),
        (OSError(errno.EROFS, "Read-only file system"), 4, "the machine: Read-only file system."),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 4, "the machine: Broken pipe. keep what"),
        (MemoryError(), 4, "memory: there is not enough. Ask for fewer rows at a time\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 4,
         "memory: CUDA out of memory. Tried to allocate 2 GiB. Ask for fewer rows"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume\n"),
    ],
)  # fmt: skip
def test_exit_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(execute=raises(error)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1, "one message, no traceback"
    assert captured.out == ""


@pytest.mark.parametrize(
    "bug", [KeyError("a"), ValueError("no such axis"), FileNotFoundError(errno.ENOENT, "No", "/x")]
)
def test_a_bug_shows_where_it_is(bug: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(execute=raises(bug)) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith(f"{type(bug).__name__}: ")
    assert "(a bug" in err.splitlines()[-1]


def test_traceback_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--traceback", execute=raises(DataError("row 3", "bad"))) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("row 3: bad\n")


def test_a_mistyped_flag_is_offered_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dry_run") == 2
    assert capsys.readouterr().err == "--dry_run: no such flag. Did you mean --dry-run?\n"


def caused(outer: BaseException, by: BaseException) -> BaseException:
    outer.__cause__ = by
    return outer


def test_the_outermost_cause_of_the_user_wins() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", "/x")
    assert command.explain(caused(ConfigError("a", "b"), denied)) == ("a: b", 2)
    assert command.explain(caused(RuntimeError("r"), DataError("a", "b"))) == ("a: b", 3)
    assert command.explain(caused(RuntimeError("r"), KeyError("k")))[0].startswith("RuntimeError")


def test_errors_come_out_of_ray_wrappers() -> None:
    from ray.exceptions import RayTaskError
    from ray.train.v2.api.exceptions import WorkerGroupError

    def task_error(cause: Exception) -> Exception:
        return RayTaskError("f", "a long traceback", cause).as_instanceof_cause()

    assert isinstance(task_error(DataError("a", "b")), DataError), "Ray's wrapper poses as it"
    assert command.explain(task_error(DataError("a", "b"))) == ("a: b", 3)
    assert command.explain(task_error(WeightsError("w")), (WeightsError,)) == ("w", 3)
    assert command.explain(task_error(KeyError("k")))[0].startswith("KeyError: 'k'")
    assert command.explain(task_error(torch.OutOfMemoryError("CUDA")))[1] == 4
    group = WorkerGroupError(
        "…", {0: ConnectionError("peer"), 1: task_error(ConfigError("a", "b"))}
    )
    assert command.explain(group) == ("a: b", 2)


@pytest.mark.parametrize("kind", [Problem, ConfigError, DataError, InfraError])
def test_problems_pickle(kind: type[Problem]) -> None:
    problem = kind("optimizer.lr", "not a number", "Give a float")
    again = pickle.loads(pickle.dumps(problem))
    assert type(again) is kind
    assert str(again) == str(problem) == "optimizer.lr: not a number. Give a float"
    assert (again.where, again.why, again.fix) == (problem.where, problem.why, problem.fix)
    assert again.exit_code == {Problem: 1, ConfigError: 2, DataError: 3, InfraError: 4}[kind]


def test_a_problem_raised_anew_from_its_wrapper_is_still_one_message() -> None:
    class Failed(Exception):
        worker_failures: ClassVar[dict[int, Exception]] = {}

    problem, wrapper = DataError("part-0.parquet", "1000 bytes", "Fetch it again"), Failed()
    wrapper.worker_failures = {1: problem}
    problem.__cause__ = wrapper
    assert command.explain(problem) == (str(problem), DataError.exit_code)
