"""A bit of a checkpoint flips: the run stops, or resumes from the checkpoint before if asked to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.checkpoints import committed
from tests.pipelines import tiny
from tests.pipelines.tiny import curve


@pytest.mark.parametrize("step", [9, 12])
def test_a_flipped_bit_in_the_last_checkpoint(
    main: Callable[..., tiny.Outcome], tmp_path: Path, data: Path, step: int
) -> None:
    argv = [f"data={data}", f"root={tmp_path}", "name=run", "train.checkpoint.keep=9"]
    assert main("pretrain", *argv).code == 0
    run, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    undisturbed = curve(run)
    weights = (run / "model/model.safetensors").read_bytes()
    # As if the run had died after this step, or before it had made a model of the last one.
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    for later in range(step + 3, 13, 3):
        shutil.rmtree(checkpoints / f"step_{later:06d}")
    (file,) = (checkpoints / f"step_{step:06d}").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    begin, end = next(v for k, v in header.items() if k.startswith("ema."))["data_offsets"]
    content[start + (begin + end) // 2] ^= 1
    file.write_bytes(content)

    code, said = main("pretrain", *argv)
    assert code == 3
    assert f"step_{step:06d}/{file.name}: damaged checkpoint" in said
    assert "corrupt=skip" in said
    assert main("pretrain", *argv, "train.checkpoint.corrupt=skip").code == 0
    assert committed(str(checkpoints)) == [3, 6, 9, 12]
    assert curve(run) == undisturbed
    assert (run / "model/model.safetensors").read_bytes() == weights
