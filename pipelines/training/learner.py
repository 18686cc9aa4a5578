"""An objective that is trained: one optimizer step, one validation.

A step is a pure function of (seed, step, lane): neither the order of the data nor the corruption
noise depends on how many workers share the lanes.

Shapes: N rows, R rows of a microbatch, L positions, V tokens, D dimensions of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dsl.denoiser import geometry_report
from dsl.noise import generator
from dsl.objective import Loss, Objective
from dsl.passes import PLAIN
from dsl.state import send
from infra import parallel
from infra.mixture import ALONE
from infra.parallel import ParallelConfig
from pipelines.kinds import Bounds
from pipelines.training.settings import TrainConfig

# Steps are counted from 1; the noise of validation is keyed where no training step can be.
VALIDATION = 0

Microbatches = Mapping[int, np.ndarray]  # lane -> [R, L] token ids
NO_NAMES: Mapping[int, str] = MappingProxyType({})
Numbered = Sequence[tuple[int, np.ndarray]]  # number, [R, L] token ids


class Learner:
    """An objective with its average and its optimizer, sharded over the workers."""

    def __init__(
        self, objective: Objective, config: TrainConfig, mesh: DeviceMesh, sharding: ParallelConfig
    ) -> None:
        self.config = config
        self.device = parallel.device()
        self.objective = objective.to(self.device)
        # Several workers cast its weights as they gather them.
        dtype = torch.float32 if parallel.shared(mesh) else sharding.dtype(self.device)
        passes = PLAIN.compiled() if sharding.compile else PLAIN
        self.objective.denoiser = self.objective.denoiser.computing_in(dtype, passes)
        self.average = parallel.averaged(self.objective, config.optimizer.ema)
        for module in (self.objective, self.average.module):
            denoiser = module.denoiser
            parallel.shard(
                module,
                denoiser.backbone.blocks,
                mesh=mesh,
                config=sharding,
                # Directions and biases must not be rounded to 8 bits: they are what an SNR is of.
                float32=(denoiser.table, denoiser.converter),
            )
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, live: loading into them restores the run."""
        from infra.checkpoints import training_tensors

        return training_tensors(self.objective, self.average, self.optimizer)

    def step(
        self, step: int, microbatches: Microbatches, sources: Mapping[int, str] = NO_NAMES
    ) -> parallel.Reduced:
        """One optimizer step over all lanes of all workers; the means of its metrics, and its
        learning rate.

        sources: the names of the sources that the microbatches of all workers' lanes are of; of
        each one that has a name the mean loss is told.
        """
        optimizer = self.config.optimizer
        lr = optimizer.lr_at(step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.objective.train()
        losses: dict[int, Loss] = {}

        def loss_of(lane: int) -> Tensor:
            losses[lane] = self._loss(self.objective, step, lane, microbatches[lane])
            return losses[lane].value

        parallel.accumulate(self.objective, sorted(microbatches), loss_of)
        norm = parallel.clip_grad_norm(self.trained, optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.objective)
        found = _mean_loss(list(losses.values())) | _by_source(losses, sources)
        return parallel.mean_over_ranks(found | {"grad_norm": norm, "lr": lr})

    @torch.no_grad()
    def validate(
        self, held_out: Mapping[str, Numbered], shares: Mapping[str, float], bounds: Bounds
    ) -> dict[str, float]:
        """Metrics of the averaged weights on numbered microbatches, at noise that never changes.

        held_out: by source; the number of a microbatch says which rows it holds. bounds: of their
        likelihood, by name; their mean is `validation/bound`. All in nats per token: a mean over
        the sources, of which each counts by its share, and where there are several, of each.
        """
        by_source = {name: self._validated(rows, bounds) for name, rows in held_out.items()}
        found = {
            key: sum(shares[name] * values[key] for name, values in by_source.items())
            for key in next(iter(by_source.values()))
        }
        for name, values in by_source.items():
            if name != ALONE:
                found |= {f"{key}/{name}": value for key, value in values.items()}
        return found | self._of_table()

    def _validated(self, microbatches: Numbered, bounds: Bounds) -> dict[str, float]:
        module = self.average.module.eval()
        losses = [self._loss(module, VALIDATION, key, rows) for key, rows in microbatches]
        found = dict(parallel.mean_over_ranks(_mean_loss(losses)))
        if bounds:
            nats = [self._bounds(module, bounds, key, rows) for key, rows in microbatches]
            over_all = parallel.mean_over_ranks(_mean(nats))
            found |= {**over_all, "bound": sum(over_all.values()) / len(bounds)}
        return {f"validation/{name}": value for name, value in found.items()}

    def _bounds(
        self, module: Objective, bounds: Bounds, number: int, rows_RL: np.ndarray
    ) -> dict[str, float]:
        tokens_RL = self._on_device(rows_RL)
        samples, first_row = self.config.bound_samples, number * len(rows_RL)

        def values() -> dict[str, float]:
            return {
                name: bound(module.denoiser, tokens_RL, samples, first_row)
                for name, bound in bounds.items()
            }

        return parallel.gathered(module, values)

    def _of_table(self) -> dict[str, float]:
        """The converter's scale and the spread of the table, which long training can collapse; of
        each, where it is trained."""
        denoiser, trained, found = self.average.module.denoiser, self.objective.denoiser, {}
        if trained.converter.beta.requires_grad:
            found["converter/beta"] = parallel.full(denoiser.converter.beta).item()
        if trained.table.direction_VD.requires_grad:
            direction_VD = parallel.full(denoiser.table.direction_VD)
            spread = geometry_report(torch.nn.functional.normalize(direction_VD, dim=-1))
            found |= {f"table/{name}": value for name, value in spread.items()}
        return found

    def _loss(self, module: Objective, step: int, lane: int, rows_RL: np.ndarray) -> Loss:
        draws = generator(self.config.stream.seed, step, lane)
        # Dropout, where there is any, draws from torch's own generator.
        torch.manual_seed(draws.initial_seed())
        return module(self._on_device(rows_RL), draws)

    def _on_device(self, rows_RL: np.ndarray) -> Tensor:
        return send(torch.from_numpy(rows_RL).to(torch.int64), self.device)


def _mean_loss(losses: list[Loss]) -> dict[str, float | Tensor]:
    """Means over this worker's microbatches."""
    return _mean([{"loss": loss.value.detach(), **loss.metrics} for loss in losses])


def _by_source(losses: Mapping[int, Loss], sources: Mapping[int, str]) -> dict[str, float | Tensor]:
    """What this worker's lanes add to the mean loss of each source of this step: values whose means
    over the workers are those losses. Nothing where there is one source alone."""
    size, found = parallel.world()[1], {}
    for name in sorted(set(sources.values()) - {ALONE}):
        mine = [loss.value.detach() for lane, loss in losses.items() if sources[lane] == name]
        found[f"loss/{name}"] = size * sum(mine) / list(sources.values()).count(name)
    return found


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """In float64, in order."""
    wide = [{k: torch.as_tensor(v, dtype=torch.float64) for k, v in row.items()} for row in rows]
    return {key: sum(row[key] for row in wide) / len(rows) for key in rows[0]}
