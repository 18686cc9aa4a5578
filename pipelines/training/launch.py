"""A training run, as its driver sees it: from a configuration to a registered model.

The driver checks the data, writes the initial weights into the run directory, starts the workers,
and turns the averaged weights of the last checkpoint into a model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsl.converter import ConverterConfig
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiTShape
from dsl.lora import merged
from dsl.objective import Objective
from dsl.vocabulary import Vocabulary
from infra import cluster, journal, tracking
from infra.errors import InfraError
from infra.mixture import ALONE, Mixture, Schedule, read_manifests
from infra.preemption import Terminated, stoppable
from infra.shards import Manifest
from infra.storage import Folder
from pipelines import models, runs
from pipelines.models import SCRATCH, Model
from pipelines.runs import Dataset, Made, Run
from pipelines.training import worker
from pipelines.training.settings import RunConfig
from pipelines.training.worker import Assignment

H100_FLOPS = 0.3 * 989e12  # bf16, at a model FLOPs utilisation of 30 %, about what was measured


def scratch(
    config: RunConfig, converter: ConverterConfig, tokens: int, *, causal: bool
) -> Denoiser:
    """The network of `init: scratch`, the same for the same seed."""
    torch.manual_seed(config.train.stream.seed)
    backbone = (config.backbone or DiTShape()).config(tokens, causal=causal)
    return Denoiser(DenoiserConfig(backbone=backbone, **vars(converter)))


def given(config: RunConfig, converter: ConverterConfig) -> Model:
    """The model at `init`; converter: of one that comes without."""
    uri = tracking.locate(config.tracking, config.root)
    return models.load(
        config.init,
        converter=converter,
        tracking_uri=uri,
        backbone=config.backbone,
        adapt=config.adapt,
        trust_remote_code=config.trust_remote_code,
    )


def plan(
    config: RunConfig,
    converter: ConverterConfig,
    objective: Callable[[Denoiser], Objective],
    *,
    causal: bool,
) -> dict[str, Any]:
    """What a run would take, for `--dry-run`."""
    manifests = read_manifests(config.mixture)
    manifest = next(iter(manifests.values()))
    if config.init == SCRATCH:
        with torch.device("meta"):
            denoiser = scratch(config, converter, manifest.vocabulary.size, causal=causal)
        kind = None
    else:
        model = given(config, converter)
        denoiser, kind = model.denoiser, model.kind
        models.require_maps(denoiser, config.lora)
    tokens = config.train.steps * config.train.stream.rows_per_step * manifest.length
    learner = objective(config.trained(denoiser))
    parameters = sum(p.numel() for p in learner.parameters())
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    flops = learner.flops_per_token(manifest.length) * tokens
    return {
        "run": config.folder.url,
        "init": config.init,
        "init_objective": kind,
        "workers": config.workers.shown,
        "parameters": parameters,
        "steps": config.train.steps,
        "tokens": tokens,
        "epochs": _epochs(config, manifests),
        # Weights, their average and AdamW's two moments, in float32.
        "checkpoint_bytes": 4 * 2 * (parameters + trained),
        "training_flops": round(flops),
        "h100_hours_at_30_percent": round(flops / H100_FLOPS / 3600, 4),
    }


def _epochs(config: RunConfig, manifests: Mapping[str, Manifest]) -> float | dict[str, float]:
    """How often each row is seen, by source where there are several."""
    stream = config.train.stream
    schedule = Schedule(config=config.mixture, seed=stream.seed)
    lanes = range(stream.num_lanes)
    counts_S = np.sum([schedule.before(lane, config.train.steps) for lane in lanes], axis=0)
    found = {
        name: round(count * stream.rows_per_microbatch / manifest.rows("train"), 2)
        for count, (name, manifest) in zip(counts_S.tolist(), manifests.items(), strict=True)
    }
    return found.get(ALONE, found)


@dataclass(kw_only=True)
class TrainingTask(runs.Task):
    """Train a denoiser and register it, from wherever an earlier attempt left it.

    kind: what the weights are trained for, written beside them. initial: the starting weights,
    asked for once in the life of a run. tags: lineage for the MLflow run. start: starts the
    workers and returns when they have ended; None: on the cluster, with Ray Train.
    """

    config: RunConfig
    kind: str
    objective: Callable[[Denoiser], Objective]
    initial: Callable[[Vocabulary], Denoiser]
    tags: Mapping[str, str]
    start: Callable[[Assignment], None] | None = None

    keys = ("run", "register")

    def stands(self, result: Mapping[str, Any]) -> bool:
        return bool(result["register"] == self.config.register)

    def prepare(self, folder: Folder) -> tuple[Dataset, Mapping[str, str]]:
        config, mixture = self.config, self.config.mixture
        self.manifests = read_manifests(mixture)
        for name, url in mixture.sources.items():
            self.vocabulary = models.vocabulary_of(self.manifests[name], Folder.at(url))
        # Errors in the data are found here, before any worker is started.
        Mixture.of(mixture, self.manifests, "train", config.train.stream)
        worker.validation_rows(mixture, self.manifests, config.train)
        if not models.exists(folder / "init"):
            denoiser = self.initial(self.vocabulary)
            models.require_room(denoiser, next(iter(self.manifests.values())).length, "init")
            models.require_maps(denoiser, config.lora)
            self._save(folder / "init", denoiser)
        return runs.dataset(
            {mixture.sources[name]: manifest for name, manifest in self.manifests.items()}
        ), self.tags

    def work(self, run: Run) -> None:
        from infra.checkpoints import drop_damaged  # half a second that `--help` is not to pay

        if models.exists(run.folder / "model"):
            return  # it was made of the last checkpoint, which need not be kept
        if self.config.train.checkpoint.corrupt == "skip":
            drop_damaged(run.folder / "checkpoints", self.config.train.steps)
        if self._is_trained(run.folder):
            return
        assignment = Assignment(
            verb=self.verb,
            config=self.config,
            kind=self.kind,
            manifests=self.manifests,
            objective=self.objective,
            run=run,
            began=time.time(),
        )
        with stoppable(run.folder) as asked:
            (self.start or on_cluster)(assignment)
            stopped = asked()
        if self._is_trained(run.folder):
            return
        if stopped:
            raise Terminated
        why = f"the workers ended before step {self.config.train.steps:,} and told no error"
        raise InfraError(run.folder.url, why, "See its logs/; the same command resumes the run")

    def conclude(self, run: Run) -> Made:
        """Turn the averaged weights of the last checkpoint into a model folder."""
        from infra.checkpoints import consolidate

        folder, step = run.folder, self.config.train.steps
        if not models.exists(folder / "model"):
            trusted = self.config.trust_remote_code
            initial = models.load_folder(folder / "init", trust_remote_code=trusted).denoiser
            denoiser = self.config.trained(initial)
            denoiser.load_state_dict(consolidate(folder / "checkpoints", step, "ema.denoiser."))
            self._save(folder / "model", merged(denoiser) if self.config.lora else denoiser)
        # A store may have taken the checkpoint and refused the last lines of the journal.
        last = next((row for row in journal.read(folder) if row["step"] == step), {})
        return Made(
            result={
                "checkpoint": (folder / "checkpoints" / f"step_{step:06d}").url,
                "model": (folder / "model").url,
                "metrics": {
                    k: v for k, v in last.items() if k not in journal.CLOCK and math.isfinite(v)
                },
                "register": self.config.register,
            }
        )

    def register(self, run: Run, result: Mapping[str, Any]) -> dict[str, Any] | None:
        name, tags = self.config.register, {"objective": self.kind}
        return runs.register(run.folder / "model", name, run.handle, tags)

    def _is_trained(self, folder: Folder) -> bool:
        from infra.checkpoints import committed

        return self.config.train.steps in committed(folder / "checkpoints")

    def _save(self, folder: Folder, denoiser: Denoiser) -> None:
        folder.remove()  # what an attempt has left that was killed while it wrote
        length = next(iter(self.manifests.values())).length
        models.save(folder, denoiser, self.vocabulary, kind=self.kind, length=length)


def on_cluster(assignment: Assignment, callbacks: Sequence[Any] = ()) -> None:
    """Train in a group of workers on the cluster; callbacks: of Ray Train."""
    workers = assignment.config.workers
    with cluster.connected(workers.cluster, needed_cpus=workers.most):
        cluster.run_group(
            worker.in_ray,
            assignment,
            name=assignment.config.name,
            num_workers=workers.count,
            use_gpu=workers.gpu,
            resources_per_worker=workers.resources,
            max_failures=workers.max_failures,
            resize_s=workers.resize_s,
            fatal=models.DATA_ERRORS,
            callbacks=callbacks,
        )
