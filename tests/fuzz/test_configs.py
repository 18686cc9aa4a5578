"""Presets and overrides of every verb, damaged: they load as written, or are one ConfigError."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from infra import command, config
from pipelines.verb import PRESETS, VERBS
from tests.fuzz import mutate
from tests.fuzz.mutate import seeds

TYPES = {
    "prepare": "prepare.PrepareConfig",
    "pretrain": "pretrain.PretrainConfig",
    "finetune": "finetune.FinetuneConfig",
    "sweep": "sweep.SweepConfig",
    "evaluate": "evaluate.EvaluateConfig",
    "generate": "generate.GenerateConfig",
    "export": "export.ExportConfig",
    "benchmark": "benchmark.BenchmarkConfig",
}


def config_type(verb: str) -> Any:
    module, _, name = TYPES[verb].rpartition(".")
    return getattr(importlib.import_module(f"pipelines.{module}"), name)


def resolved(capsys: pytest.CaptureFixture[str], verb: str, *argv: str) -> tuple[int, str]:
    """`--print-config` through the harness of the command line."""

    def never(settings: Any) -> dict[str, Any]:
        raise AssertionError("only the configuration was asked for")

    code = command.run(
        verb, config_type(verb), plan=never, execute=never, verbs=VERBS,
        presets=PRESETS, doc="",
        argv=[*argv, "--print-config"],
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "a bug" not in err, err[:500]
    assert len(err) < 2_100
    return code, out


def verdict(capsys: pytest.CaptureFixture[str], folder: Path, verb: str, *argv: str) -> None:
    """Either exit code 2 and nothing on stdout, or a configuration that prints as it reads."""
    code, out = resolved(capsys, verb, *argv)
    if code:
        assert (code, out) == (2, "")
        return
    (folder / "again.yaml").write_text(out, encoding="utf-8")
    assert resolved(capsys, verb, str(folder / "again.yaml")) == (0, out)


NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


@seeds(120)
def test_presets(capsys: pytest.CaptureFixture[str], tmp_path: Path, seed: str) -> None:
    rng = Random(f"preset {seed}")
    content = (PRESETS / f"{rng.choice(NAMES)}.yaml").read_bytes()
    verb = rng.choice([verb for verb in VERBS if verb in yaml.load(content, yaml.CSafeLoader)])
    file = tmp_path / "preset.yaml"
    if rng.random() < 0.3:
        file.write_bytes(mutate.bytes_(rng, content))
        if rng.random() < 0.2:
            mutate.place(rng, file)
    else:
        section = yaml.load(content, yaml.CSafeLoader)[verb]
        file.write_bytes(dumped({verb: mutate.tree(rng, section)}))
    verdict(capsys, tmp_path, verb, str(file))


def dumped(value: Any) -> bytes:
    """YAML in its JSON spelling, which can say any text."""
    return json.dumps(value).encode()


VALUES: tuple[str, ...] = (
    "", "~", "null", "yes", "0", "-1", "1e400", "-1e-400", ".nan", "nan", ".inf", "0x" + "f" * 5000,
    "9" * 5000, "99999999999999999999", "1:2:3", "2020-99-99", "[2020-01-01]", "[", "{", "'",
    "{}", "[[[]]]", "{kind: []}", "{kind: {}}", "{kind: masked, kind: order}", "masked", "[]",
    "x" * 99_999,
    "\0", "a\0", "\udcff", "\ud800", "!!python/object/apply:os.system ['true']",
    "[!!python/name:os.system ]", "{a: &a [*a]}", "{a: &a 1, b: *a}", "[" * 10_000,
    "{a: " * 10_000, "[!!int '']", "[!!timestamp x]", "[!!binary x]", "{? [a] : b}", "{<<: 3}",
    "../../x", "s3://x/y",
    "{kind: choice, values: [.nan]}", "{kind: uniform, low: .nan, high: 1}", "[null]", "<script>",
    "{kind: file, path: 3}", "{1: 2}", "{'': masked}", "{'../x': masked}", "[1, [2], {a: b}]",
)  # fmt: skip


@seeds(120)
def test_overrides(capsys: pytest.CaptureFixture[str], tmp_path: Path, seed: str) -> None:
    rng = Random(f"override {seed}")
    verb = rng.choice(VERBS)
    keys = [field.key for field in config.describe(config_type(verb))]
    given = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(keys)
        spoil: Callable[[str], str] = rng.choice(
            (str, str, str, str, lambda key: f"{key}.x", lambda key: key.rpartition(".")[0] or key)
        )
        given.append(f"{spoil(key)}={rng.choice(VALUES)}")
    verdict(capsys, tmp_path, verb, "quickstart", *given)


BOMBS = {
    "laughs": "a: &a [x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
    ),
    "itself": "prepare: &all\n  vocabulary: *all\n",
    "merged": "prepare: &all\n  <<: *all\n",
    "key": "? &a [x]\n: 1\n? [*a, *a]\n: 2\n",
    "deep": "prepare: " + "[" * 10_000,
    "deeper": "prepare: " + "{a: " * 10_000,
    "long": f"prepare: {{out: {mutate.LONG}}}",
    "long key": f"prepare: {{{mutate.LONG[:99_999]}: 1}}",
    "twice": "prepare: {out: a, out: b}",
    "object": "prepare: !!python/object/apply:os.mkdir [canary]",
    "module": "prepare: {out: !!python/module:this }",
    "nan": "prepare: {out: x, validation: .nan}",
    "bytes": "prepare: {out: !!binary aGVsbG8=}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.yaml").write_text(BOMBS[bomb])
    assert resolved(capsys, "prepare", "bomb.yaml") == (2, "")
    assert not (tmp_path / "canary").exists()
