"""What users give us wrong: one message that says where, why and what to do, and the exit code.

Everything goes through the verbs' own `main`, and nothing may be left that looks finished.
"""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from infra.shards import MANIFEST, ShardWriter, read_manifest
from pipelines import pretrain
from tests.pipelines import tiny

REPOSITORY = Path(pretrain.__file__).parents[1]


# --- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "argv", "where"),
    [
        # More of it in tests/infra/test_config.py.
        ("pretrain", ["train.optimizer.lrr=1"], "train.optimizer.lrr (command line)"),
        ("finetune", ["support.kind=raor"], "support.kind (command line)"),
        ("pretrain", ["nowhere.yaml"], "nowhere.yaml"),
        ("prepare", ["length=2.5"], "length (command line)"),
        ("prepare", ["length=200000"], "and 131,072 at most, got 200000"),
        ("prepare", ["vocabulary={kind: bpe, size: 9}"], "size must be 257 to 1,048,576"),
        ("prepare", ["vocabulary={kind: bpe, size: 9999999}"], "1,048,576, got 9999999"),
        ("pretrain", ["objective=dsl"], "objective (command line)"),
        ("pretrain", ["train.steps=0"], "steps must be at least 1, got 0"),
        ("pretrain", ["train.bound_samples=1"], "bound_samples must be at least 2, got 1"),
        ("pretrain", ["register=team/dsl"], "register must be a name without / : @ '"),
        ("finetune", ["register=''"], "register must be a name without"),
        ("pretrain", ["train.optimizer.clip=nan"], "expected float, got 'nan'"),
        ("pretrain", ["train.optimizer.betas=[0.9, nan]"], "expected float, got 'nan'"),
        ("pretrain", ["train.checkpoint.every=0"], "every must be at least 1, got 0"),
        ("pretrain", ["train.checkpoint.keep=-1"], "keep must be at least 1, got -1"),
        ("pretrain", ["train.checkpoint.milestone_every=0"], "milestone_every must be at least 1"),
        ("pretrain", ["train.optimizer.lr=-1"], "lr must be at least 0, got -1"),
        ("pretrain", ["train.optimizer.betas=[0.9, 1]"], "betas must be in [0, 1)"),
        ("pretrain", ["train.optimizer.weight_decay=-1"], "weight_decay must be at least 0"),
        ("pretrain", ["train.optimizer.clip=0"], "clip must be positive, got 0"),
        ("pretrain", ["train.optimizer.warmup=-5"], "warmup must be at least 0, got -5"),
        ("pretrain", ["train.optimizer.ema=1"], "ema must be in [0, 1), got 1"),
        ("pretrain", ["train.checkpoint.max_failures=0"], "max_failures must be at least 1, got 0"),
        ("pretrain", ["workers.max_failures=-2"], "max_failures must be at least 0, or -1 for no"),
        ("pretrain", ["workers.cluster.num_cpus=0"], "num_cpus must be at least 1, got 0"),
        ("pretrain", ["workers.cluster.num_cpus=-1"], "num_cpus must be at least 1, got -1"),
        ("pretrain", ["workers.parallel.threads=0"], "threads must be at least 1, got 0"),
        ("pretrain", ["workers.parallel.stall_s=.inf"], "stall_s must be positive, and 1e+08"),
        ("pretrain", ["backbone.heads=0"], "sizes must be positive"),
        ("pretrain", ["backbone.width=6"], "a multiple of twice the heads"),
        ("pretrain", ["backbone.dropout=1"], "dropout 1.0 must lie in [0, 1)"),
        ("finetune", ["support.roar_share=2"], "roar_share"),
        ("pretrain", ["data=ss3://bucket/x"], "ss3://"),
    ],
)
def test_a_mistyped_command_line(
    main: Callable[..., tiny.Outcome], verb: str, argv: list[str], where: str
) -> None:
    given = {"name": "x", "data": "x", "out": "x", "init": "x"}
    wanted = [f.name for f in dataclasses.fields(tiny.CONFIGS[verb]) if f.name in given]
    code, said = main(verb, *(f"{name}={given[name]}" for name in wanted), *argv)
    assert (code, where in said) == (2, True), said


def test_the_real_command_line(tmp_path: Path) -> None:
    """The scripts themselves: exit codes reach the shell, and no traceback comes unasked."""

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *argv]
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPOSITORY)

    wrong = run("pipelines/finetune.py", "quickstart", "train.stepz=9")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == ("train.stepz (command line): no such key. Did you mean `steps`?\n")
    absent = run("pipelines/prepare.py", f"source={tmp_path}/none.txt", f"out={tmp_path}/out")
    assert (absent.returncode, absent.stdout) == (3, "")
    assert "none.txt: no such file. Check the URL" in absent.stderr
    assert not (tmp_path / "out").exists()


# --- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl.gz", gzip.compress(b"\n\n", mtime=0), "the corpus is empty"),
        ("short.txt", b"a few words", "11 characters are too few for a validation share of 0.05"),
        ("garbage.txt", bytes(range(256)) * 99, "not UTF-8 text"),  # more in test_corpus.py
        ("Upper.jsonl", b'{"text": "lower UPPER"}\n' * 99, "'U' is not in this vocabulary of 28"),
    ],
)
def test_bad_text(
    main: Callable[..., tiny.Outcome], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    code, said = main("prepare", f"source={tmp_path / name}", f"out={tmp_path / 'out'}")
    assert (code, message in said, name in said) == (3, True, True), said
    assert not (tmp_path / "out" / MANIFEST).exists()


# --- shards ------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path, data: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(data, tmp_path / "shards"))


def edit(shards: Path, **facts: Any) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    (shards / MANIFEST).write_text(json.dumps(manifest | facts))


def cut(shards: Path) -> None:
    file = shards / "train" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def another_vocabulary(shards: Path) -> None:
    file = shards / "tokenizer.json"
    file.write_text(file.read_text().replace('"z"', '"Z"'))


def an_id_too_many(shards: Path) -> None:
    """Shards of a larger vocabulary under the manifest's claim of this one."""
    manifest = read_manifest(str(shards))
    claimed = json.loads((shards / MANIFEST).read_text())
    larger = type(manifest.vocabulary)(kind="char", sha256="0", size=41)
    rules = {"source": "", "split_rule": "", "blocks": "eos", "overwrite": True}
    with ShardWriter(str(shards), vocabulary=larger, length=32, **rules) as writer:
        for split in ("train", "validation"):
            writer.write(split, np.full((400, 32), 40))
    edit(shards, vocabulary=claimed["vocabulary"])


# More of it in tests/infra/test_shards.py and tests/fuzz.
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda at: (at / MANIFEST).unlink(), "no finished shards here. Run `prepare`"),
    "length": (lambda at: edit(at, length=16), "fixed_size_list"),
    "vocabulary": (another_vocabulary, "not the vocabulary that the manifest names"),
    "no tokenizer": (lambda at: (at / "tokenizer.json").unlink(), "tokenizer.json"),
    "truncated": (cut, "bytes where the manifest has"),
    "id": (an_id_too_many, "row 0: id 40 where the vocabulary has 28 entries"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_shards(
    main: Callable[..., tiny.Outcome], tmp_path: Path, shards: Path, damage: str
) -> None:
    spoil, message = DAMAGE[damage]
    spoil(shards)
    argv = [f"data={shards}", f"root={tmp_path}", "name=run"]
    code, said = main("pretrain", *argv)
    assert (code, message in said) == (3, True), said
    assert str(shards) in said
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_step_that_is_larger_than_the_validation_split(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path
) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run"]
    code, said = main("pretrain", *argv, "train.stream.rows_per_microbatch=500")
    assert (code, "Prepare a larger validation split" in said) == (3, True), said


def test_data_without_a_validation_split(main: Callable[..., tiny.Outcome], tmp_path: Path) -> None:
    data = tiny.shards(tmp_path / "data", validation="0")
    code, said = main("pretrain", f"data={data}", f"root={tmp_path}", "name=run")
    assert (code, "validation: 0 rows, where" in said) == (3, True), said


# --- weights -----------------------------------------------------------------------------------


def missing(model: Path) -> str:
    return str(model.with_name("nowhere"))


def unfinished(model: Path) -> str:
    (model / "config.json").unlink()
    return str(model)


def interrupted(model: Path) -> str:
    run = model.with_name("run that was stopped")
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    return str(run)


def other_tokens(model: Path) -> str:
    another_vocabulary(model)
    config = json.loads((model / "config.json").read_text())
    del config["sha256"]  # somebody meant it
    (model / "config.json").write_text(json.dumps(config))
    return str(model)


INITS: dict[Callable[[Path], str], str] = {
    missing: "nowhere: no such model. Give a run, a model folder or models:/name@alias",
    unfinished: "config.json: no such file",
    interrupted: "a run without a model. A run of pretrain or finetune has one when it ends",
    other_tokens: "another vocabulary of the same size. Prepare the data with the model's own",
}


@pytest.mark.parametrize("spoil", INITS, ids=lambda spoil: spoil.__name__)
def test_bad_weights_to_start_from(
    main: Callable[..., tiny.Outcome],
    tmp_path: Path,
    data: Path,
    finished: Path,
    spoil: Callable[[Path], str],
) -> None:
    init = spoil(Path(shutil.copytree(finished / "model", tmp_path / "model")))
    argv = [f"data={data}", f"root={tmp_path}", "name=run", f"init={init}"]
    code, said = main("finetune", *argv)
    assert (code, INITS[spoil] in said) == (3, True), said
    assert not (tmp_path / "run" / "init" / "config.json").exists()


def test_an_autoregressive_model_is_no_start(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path
) -> None:
    root = [f"data={data}", f"root={tmp_path}"]
    tiny.execute("pretrain", *root, "name=ar", "objective=ar", "train.steps=2")
    code, said = main("finetune", *root, "name=run", f"init={tmp_path / 'ar'}")
    assert (code, "is autoregressive. Give a masked model" in said) == (2, True), said
    code, said = main("pretrain", *root, "name=other", f"init={tmp_path / 'ar'}")
    assert (code, "was trained as ar, and this objective makes mdlm" in said) == (2, True), said


def test_a_vocabulary_of_another_size(
    main: Callable[..., tiny.Outcome], tmp_path: Path, finished: Path
) -> None:
    data = tiny.shards(tmp_path, vocabulary="{kind: bpe, size: 300}")
    argv = [f"data={data}", f"root={tmp_path}", "name=run", f"init={finished}"]
    code, said = main("finetune", *argv)
    assert (code, "has 28 tokens, the data has 300" in said) == (3, True), said


def test_a_store_that_does_not_answer(
    main: Callable[..., tiny.Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is down is no missing file."""

    def refuse(self: MemoryFileSystem, path: str, **kwargs: object) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    code, said = main("prepare", "source=memory://bucket/a.txt", f"out={tmp_path / 'out'}")
    assert (code, "memory://bucket/a.txt: the store does not answer" in said) == (4, True), said


def test_a_registry_that_does_not_answer(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path
) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run", "init=models:/dsl@champion"]
    code, said = main("finetune", *argv)
    assert (code, "the model registry refused or did not answer" in said) == (4, True), said
