"""What a step, the input, a checkpoint and a sweep cost on many GPUs, on paper.

Data parallel with all weights sharded (FSDP2), as `infra.parallel` does it: each microbatch
gathers the bf16 weights twice, for its forward and its backward pass, and each step reduces the
float32 gradients once. Nothing is taken to overlap, so that a column says what there is to hide.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from dsl.denoiser import Denoiser
from pipelines.benchmarks import flops
from pipelines.benchmarks.settings import BenchmarkConfig, PaperConfig
from pipelines.report import Column, Row, Table

NODE = 8  # GPUs that share an NVLink
BF16, FLOAT32 = 2, 4  # bytes
COPIES = 4  # float32 tensors of a checkpoint: weights, their average, AdamW's two moments
GATHERS = 2  # of all the weights, for every microbatch
TOKEN = 2  # bytes of an id at rest, before compression
MB, GB = 1e6, 1e9

COLUMNS = (
    Column("gpus", "GPUs"),
    Column("tokens", "Tokens a step", ",d"),
    Column("compute_ms", "Compute, ms", ",.1f"),
    Column("bytes_ms", "Bytes, ms", ",.1f"),
    Column("latency_ms", "Latency, ms", ",.1f"),
    Column("efficiency", "Compute's share, %", ".0f"),
    Column("rows", "Rows a GPU to hide it", ",d"),
    Column("tokens_per_s", "M tokens/s", ",.2f"),
    Column("read_mb", "Read, MB/s", ",.1f"),
    Column("state_mb", "State a GPU, MB", ",.0f"),
    Column("checkpoint_s", "Checkpoint, s", ",.2f"),
    Column("upload_percent", "Upload, % of the time", ",.2f"),
    Column("sweep_hours", "Sweep, h", ",.2f"),
    Column("limit", "Breaks first"),
)


def cost(config: BenchmarkConfig) -> float:
    return 0.0


def run(config: BenchmarkConfig) -> Table:
    given = config.paper
    model = Model.of(config)
    rows = [scaled(model, given, gpus) for gpus in given.gpus]
    note = (
        f"MDLM steps of {model.parameters / 1e6:.0f} M parameters, L={given.length}, {given.rows} "
        f"rows on a GPU at a time, {given.lanes} of them a step. Assumed: {given.tflops:g} TFLOP/s "
        f"bf16 at {100 * given.mfu:g} % MFU, {given.nvlink_gbytes:g} GB/s NVLink in nodes of "
        f"{NODE}, {given.network_gbits:g} Gb/s a GPU between them, {given.latency_us:g} µs a hop "
        f"of a ring, a store of {given.store_gbytes:g} GB/s a node. Nothing overlaps. A checkpoint "
        f"every {given.checkpoint_every} steps. Sweep: {given.trials} trials of "
        f"{given.trial_steps:,} steps of one GPU's size, one trial a GPU."
    )
    return Table(title="On paper", note=note, columns=COLUMNS, rows=rows)


class Model(NamedTuple):
    """`flops` of one token's training step; `units` that are gathered one after the other."""

    parameters: int
    flops: float
    units: int

    @classmethod
    def of(cls, config: BenchmarkConfig) -> Model:
        denoiser = config.model.mdlm()
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Denoiser(denoiser).parameters())
        # Half of the positions are masked on average, and only those are predicted.
        work = flops.STEP * flops.forward(denoiser, config.paper.length, predicted=0.5)
        return cls(parameters, work, denoiser.backbone.blocks + 1)


def scaled(model: Model, given: PaperConfig, gpus: int) -> Row:
    """One row of the table: seconds and bytes at a number of GPUs."""
    tokens = given.rows * given.lanes * given.length
    compute_s = tokens * model.flops / (given.mfu * given.tflops * 1e12)
    moved, hops = _collectives(model, given.lanes, gpus)
    bandwidth = given.nvlink_gbytes * GB if gpus <= NODE else given.network_gbits * GB / 8
    bytes_s, latency_s = moved / bandwidth, hops * given.latency_us * 1e-6
    step_s = compute_s + bytes_s + latency_s
    nodes = math.ceil(gpus / NODE)
    checkpoint_s = COPIES * FLOAT32 * model.parameters / (nodes * given.store_gbytes * GB)
    per_s = gpus * tokens / step_s
    upload = checkpoint_s / (given.checkpoint_every * step_s)
    read_share = per_s * TOKEN / (nodes * given.store_gbytes * GB)
    shares = {
        "bytes of the collectives": bytes_s / compute_s,
        "latency of the collectives": latency_s / compute_s,
        "upload of checkpoints": upload,
        "reading": read_share,
    }
    return {
        "gpus": gpus,
        "tokens": gpus * tokens,
        "compute_ms": 1e3 * compute_s,
        "bytes_ms": 1e3 * bytes_s,
        "latency_ms": 1e3 * latency_s,
        "efficiency": 100 * compute_s / step_s,
        "rows": math.ceil(given.rows * max(1.0, (bytes_s + latency_s) / compute_s)),
        "tokens_per_s": per_s / 1e6,
        "read_mb": per_s * TOKEN / MB,
        "state_mb": COPIES * FLOAT32 * model.parameters / gpus / MB,
        "checkpoint_s": checkpoint_s,
        "upload_percent": 100 * upload,
        "sweep_hours": math.ceil(given.trials / gpus) * given.trial_steps * compute_s / 3600,
        "limit": max(shares, key=shares.__getitem__),
    }


def _collectives(model: Model, lanes: int, gpus: int) -> tuple[float, int]:
    """Bytes that a GPU sends in a step, and hops that are waited for, of rings over all GPUs."""
    weights = GATHERS * lanes * BF16 * model.parameters
    gradients = FLOAT32 * model.parameters
    rounds = (GATHERS * lanes + 1) * model.units
    return (weights + gradients) * (gpus - 1) / gpus, rounds * (gpus - 1)
