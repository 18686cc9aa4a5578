"""The command `gpu-check` on a CPU: it needs few packages, passes nothing that it cannot measure,
and tells what it has found however it ends."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from dsl import dit
from infra.checkpoints import Checkpoints
from infra.parallel import ParallelConfig
from pipelines.benchmarks.results import Bar
from pipelines.benchmarks.settings import build
from pipelines.gpu_check import __main__ as command
from pipelines.gpu_check import bf16, parity, profiles, resume, sampler, train
from pipelines.gpu_check.findings import Finding
from pipelines.gpu_check.settings import SMALL, Check
from tests.gpu import GPU, standing_in
from tests.infra.common import until

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    "ray", "mlflow", "pyarrow", "pandas", "s3fs", "transformers", "matplotlib", "optuna", "mauve",
    "safetensors", "tokenizers", "scipy", "huggingface_hub", "zstandard", "tqdm",
)  # fmt: skip
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder
class Few(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)
sys.meta_path[:] = [Few if finder is PathFinder else finder for finder in sys.meta_path]
"""
ON_CPU = ("--device", "cpu", "--small")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python, and each process that it starts, has few packages."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    refused = subprocess.run([sys.executable, "-c", "import ray"], env=env, capture_output=True)
    assert b"No module named 'ray'" in refused.stderr  # or the tests would show nothing
    return env


def run(out: Path, *argv: str, env: dict[str, str]) -> tuple[int, dict[str, Any], list[Any]]:
    """Exit code, last line and findings of the command; what it logged is shown if a test fails."""
    given = [sys.executable, "-m", "pipelines.gpu_check", "--out", str(out), *ON_CPU, *argv]
    done = subprocess.run(given, capture_output=True, text=True, env=env, cwd=ROOT)
    logs = [f"{log.name}:\n{log.read_text()}" for log in out.glob("*.log")]
    sys.stderr.write("\n".join([*logs, done.stderr]))
    assert done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["report"] == str(out / "gpu_check.json")
    return done.returncode, told, json.loads((out / "gpu_check.json").read_text())["findings"]


@pytest.mark.long
def test_a_stage_needs_few_packages(tmp_path: Path, bare: dict[str, str]) -> None:
    code, told, findings = run(tmp_path / "out", "--only", "facts", env=bare)
    assert (code, told["failed"]) == (0, []), findings
    assert any("attention" in found["what"] for found in findings)


def test_every_stage_can_be_imported_with_few_packages(bare: dict[str, str]) -> None:
    names = ", ".join(f"pipelines.gpu_check.{stage}" for stage in command.LIMITS)
    subprocess.run([sys.executable, "-c", f"import {names}"], check=True, env=bare, cwd=ROOT)


@pytest.mark.long
def test_every_stage_comes_to_its_end(tmp_path: Path, bare: dict[str, str]) -> None:
    code, told, findings = run(tmp_path / "out", env=bare)
    assert (code, told["failed"]) == (0, []), findings
    assert [found["stage"] for found in findings if "the stage" in found["what"]] == list(
        command.LIMITS
    )
    verdicts = {found["what"]: found["verdict"] for found in findings}
    for what, verdict in verdicts.items():
        if any(word in what for word in ("MFU", "waits", " / ", "from the CPU's", "loss of mdlm")):
            assert verdict == "not measured", what
    assert sum("bits that differ" in what for what in verdicts) >= 1
    assert sum("graph breaks" in what for what in verdicts) == 2


def test_the_full_check_takes_at_most_ten_minutes() -> None:
    assert sum(command.LIMITS.values()) <= 600


# As sitecustomize.py: puts a stage in the place of `facts` that crashes in native code.
CRASHING = """
import os, sys
def run(check):
    os.abort()
    yield
sys.modules["pipelines.gpu_check.facts"] = sys.modules[__name__]
"""


def test_a_stage_that_crashes_leaves_the_place_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert command.main(["--out", str(tmp_path), *ON_CPU, "--only", "facts"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "exit code -6" in told["failed"][0]
    assert "line 4 in run" in (tmp_path / "facts.log").read_text()


# A stage that finds one thing and then hangs, as does a process that it has started.
HANGING = """#!/bin/sh
echo '{"what": "a fact", "value": 1, "unit": "", "bar": "", "verdict": ""}' > "$4/$6.jsonl"
mkdir "$4/scratch"
sleep 1000 &
echo $! > "$4/sleeper"
wait
"""


def hanging(folder: Path) -> str:
    (folder / "python").write_text(HANGING)
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def assert_all_ended(folder: Path) -> None:
    assert not (folder / "scratch").exists()
    sleeper = Path("/proc", (folder / "sleeper").read_text().strip(), "stat")
    # Dead, or a zombie that nobody has buried yet.
    until(lambda: not sleeper.exists() or sleeper.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_stage_that_hangs_is_ended_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", hanging(tmp_path))
    monkeypatch.setattr(command, "LIMIT_CPU", 3)
    argv = ["--out", str(tmp_path), *ON_CPU, "--only", "facts", "parity"]
    assert command.main(argv) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line.partition(":")[0] for line in told["failed"]] == ["facts", "parity"]
    findings = json.loads((tmp_path / "gpu_check.json").read_text())["findings"]
    assert next(found["what"] for found in findings if found["stage"] == "facts") == "a fact"
    assert_all_ended(tmp_path)


def test_a_check_that_is_terminated_ends_its_stage(tmp_path: Path) -> None:
    argv = ["--out", str(tmp_path), *ON_CPU, "--only", "facts"]
    code = f"import sys; from {command.__name__} import main; "
    code += f"sys.executable = {hanging(tmp_path)!r}; sys.exit(main({argv}))"
    check = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: (tmp_path / "sleeper").exists() and (tmp_path / "sleeper").read_text())
    check.terminate()
    assert check.wait(60) == 128 + signal.SIGTERM
    assert_all_ended(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_wrong_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file"), *ON_CPU]) == 2
    assert "--out cannot be written" in capsys.readouterr().err


def test_a_card_that_is_full_at_the_first_size_misses_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Check, "speed_counts", True)
    monkeypatch.setattr(profiles, "peak_gib", full)
    check = Check(out=tmp_path, device=torch.device("cpu"), sizes=SMALL)
    learner: Any = SimpleNamespace(step=full)
    found = list(train._at_all_sizes(check, "mdlm", learner))
    assert [(finding.value, finding.verdict) for finding in found] == [
        ("out of memory", ""),
        (0.0, "FAIL"),
    ]


def test_a_stage_that_fails_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert command.main(["--out", str(tmp_path), *ON_CPU, "--only", "facts"]) == 1
    (failed,) = json.loads(capsys.readouterr().out.splitlines()[-1])["failed"]
    assert "exit code 1" in failed
    assert str(tmp_path / "facts.log") in failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_how_to_try_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "--device cpu --small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "bar", "verdict"),
    [
        (1.0, Bar("≤", 2, here=True), "pass"),
        (3.0, Bar("≤", 2, here=True), "FAIL"),
        (math.nan, Bar("≤", 2, here=True), "FAIL"),
        (math.nan, Bar("≥", 2, here=True), "FAIL"),
        (1.0, Bar("≤", 2, here=False), "not measured"),
        (None, Bar("≤", 2, here=True), "not measured"),
        (1.0, None, ""),
    ],
)
def test_only_what_was_measured_is_judged(value: Any, bar: Bar | None, verdict: str) -> None:
    row = Finding("what", value, "s", bar).row()
    assert row["verdict"] == verdict
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_loss_that_is_no_number_misses_the_bar_at_whatever_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where steps with a small gap come before it."""

    def learner(objective: Any, config: Any, mesh: Any, sharding: ParallelConfig) -> Any:
        lost = sharding.compute_dtype == "bfloat16"
        losses = {step: math.nan if lost and step > 2 else 1.0 for step in range(1, 21)}
        return SimpleNamespace(step=lambda step, _: {"loss": losses[step]})

    monkeypatch.setattr(bf16, "Learner", learner)
    monkeypatch.setattr(bf16, "_gradients", lambda *_: {})
    check = Check(out=tmp_path, device=torch.device("cpu"), sizes=SMALL)
    gaps = [found for found in bf16.run(check) if "gap" in found.what]
    assert [gap.verdict for gap in gaps] == ["FAIL", "FAIL"]


@torch.no_grad()
def test_the_bare_network_is_given_what_calls_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs in float32 would make it slower than the network of a call is."""
    monkeypatch.setattr(sampler, "dtype_of", lambda *_: torch.bfloat16)  # as on a GPU
    check = Check(out=tmp_path, device=torch.device("cpu"), sizes=SMALL)
    denoiser = build(SMALL.model.dsl(), check.device).eval().computing_in(torch.bfloat16)
    seen: set[torch.dtype] = set()
    denoiser.backbone.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    procedures = sampler.procedures(denoiser, check.benchmark(rows=1).sampler)
    for name in ("backbone", "head", "masked", "sde"):
        procedures[name](0)
    assert seen == {torch.bfloat16}


def test_waits_are_counted_by_torchs_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def procedure() -> None:
        for _ in range(3):
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally)", stacklevel=2
            )
        warnings.warn("something else", stacklevel=2)

    assert profiles.synchronisations(procedure, torch.device("cuda")) == 3
    assert modes == ["warn", "default"]
    assert profiles.synchronisations(procedure, torch.device("cpu")) is None


def test_waits_are_counted_in_a_step_that_is_not_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one compiles, and to try kernels is to wait for them."""
    steps: list[int] = []
    monkeypatch.setattr(profiles, "synchronisations", lambda *_: len(steps))
    monkeypatch.setattr(profiles, "kernels", lambda *_: "")
    learner: Any = SimpleNamespace(step=lambda step, _: steps.append(step))
    check = Check(out=tmp_path, device=torch.device("cpu"), sizes=SMALL)
    waits, _ = train._inside(check, "mdlm", learner)
    assert waits.value == 1


def test_only_kernels_are_among_the_longest_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of AdamW and a compiled graph are stretches that hold the time of their kernels."""

    def event(key: str, where: DeviceType, us: float, *, stretch: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=where, self_device_time_total=us, is_user_annotation=stretch
        )

    events = [
        event("aten::mm", DeviceType.CPU, 3.0),
        event("gemm", DeviceType.CUDA, 3.0),
        event("softmax", DeviceType.CUDA, 1.0),
        event("## Call CompiledFxGraph ##", DeviceType.CUDA, 4.0, stretch=True),
    ]
    monkeypatch.setattr(profiles, "_events", lambda *_: events)
    told = profiles.kernels(lambda: None, torch.device("cuda"))
    assert told == "75% gemm; 25% softmax"


def test_a_named_stretch_of_the_program_is_no_kernel() -> None:
    def procedure() -> None:
        with torch.profiler.record_function("a step"):
            torch.ones(4).exp()

    told = profiles.kernels(procedure, torch.device("cpu"))
    assert "aten::exp" in told
    assert "a step" not in told


class Here:
    """In place of a pool of processes: this one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        found = function(*arguments)
        return SimpleNamespace(result=lambda: found)


@pytest.mark.parametrize("broken", [False, True])
def test_a_checkpoint_that_is_not_loaded_is_found(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check(out=tmp_path, device=torch.device("cpu"), sizes=SMALL)
    monkeypatch.setattr(resume, "ProcessPoolExecutor", Here)
    if broken:
        monkeypatch.setattr(Checkpoints, "resume", lambda self, tensors: (None, {}))
    assert [found.verdict for found in resume.run(check)] == ["FAIL" if broken else "pass", ""]


@pytest.mark.parametrize("injected", [True, False])
def test_texts_are_compared_by_the_noise_of_the_cpu(
    injected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {name: parity.PATHS[name] for name in ("sentence_sde", "token_sde", "hybrid")}
    monkeypatch.setattr(parity, "PATHS", chosen)
    with standing_in():
        check = Check(out=tmp_path, device=GPU, sizes=SMALL)
        with parity.noise_of_the_cpu() if injected else nullcontext():
            differ = [found.value for found in parity._of_texts(check)]
    assert differ == [0, 0] if injected else min(differ) > 0


def test_float64_is_compared_at_the_angles_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's cosines differ from a CPU's in the last bits of float32."""
    angles = dit.rotary

    def of_device(length: int, head_dim: int, device: torch.device) -> torch.Tensor:
        return angles(length, head_dim, device) * (1 if device.type == "cpu" else 1 + 2**-23)

    monkeypatch.setattr(dit, "rotary", of_device)
    with standing_in(), parity.noise_of_the_cpu():
        check = Check(out=tmp_path, device=GPU, sizes=SMALL)
        apart = {
            dtype: max(found.value for found in parity._of_loss(check, "dsl", dtype))
            for dtype in parity.ALLOWED
        }
    assert apart[torch.float64] < 1e-12
    assert apart[torch.float32] > 1e-8  # where the device's own are compared
