"""Models to export, and a stranger: a process that has transformers, and nothing of this code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import dsl
from dsl.dit import DiTConfig

LENGTH = 12
ROOMS = ("dsl", "infra", "pipelines", "ray", "mlflow")
PREAMBLE = f"""
import json, sys
sys.modules.update(dict.fromkeys({ROOMS}))  # importing one of them is an error
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
given = json.loads(sys.argv[1])
def opened(name):
    return AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)
"""


def saved(
    folder: Path, *, objective: str = "dsl", vocabulary: dsl.Vocabulary | None = None
) -> Path:
    """A small network with weights drawn at random, over characters by default."""
    torch.manual_seed(0)
    vocabulary = vocabulary or dsl.Vocabulary.char()
    backbone = DiTConfig(
        tokens=vocabulary.size, width=16, blocks=2, heads=2, cond_dim=8, start="open",
        causal=objective == "ar",
    )  # fmt: skip
    denoiser = dsl.Denoiser(dsl.DenoiserConfig(backbone=backbone, embed_dim=4))
    metadata = {"objective": objective, "length": LENGTH}
    dsl.save(denoiser, folder, vocabulary, metadata=metadata)
    return folder


def stranger(code: str, given: Any, folder: Path, **environment: str) -> Any:
    """What the code prints as its last line, a JSON value; `given` and `opened` are defined."""
    variables = {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    ended = subprocess.run(
        [sys.executable, "-I", "-c", PREAMBLE + code, json.dumps(given)],
        cwd=folder,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])
