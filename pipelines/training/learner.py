"""An objective that is trained: one optimizer step, one validation.

A step is a pure function of (seed, step, lane): neither the order of the data nor the corruption
noise depends on how many workers share the lanes.

Shapes: N rows, R rows of a microbatch, L positions, V tokens, D dimensions of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dsl.denoiser import geometry_report
from dsl.noise import generator
from dsl.objective import Loss, Objective
from infra import parallel
from infra.parallel import ParallelConfig
from pipelines.kinds import Bounds
from pipelines.training.settings import TrainConfig

# Steps are counted from 1; the noise of validation is keyed where no training step can be.
VALIDATION = 0

Microbatches = Mapping[int, np.ndarray]  # lane -> [R, L] token ids


class Learner:
    """An objective with its average and its optimizer, sharded over the workers."""

    def __init__(
        self, objective: Objective, config: TrainConfig, mesh: object, sharding: ParallelConfig
    ) -> None:
        self.config = config
        self.device = parallel.device()
        self.objective = objective.to(self.device)
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
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, live: loading into them restores the run."""
        from infra.checkpoints import training_tensors

        return training_tensors(self.objective, self.average, self.optimizer)

    def step(self, step: int, microbatches: Microbatches) -> dict[str, float]:
        """One optimizer step over all lanes of all workers; the means of its metrics."""
        optimizer = self.config.optimizer
        lr = optimizer.lr_at(step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.objective.train()
        losses: list[Loss] = []

        def loss_of(lane: int) -> Tensor:
            losses.append(self._loss(self.objective, step, lane, microbatches[lane]))
            return losses[-1].value

        parallel.accumulate(self.objective, sorted(microbatches), loss_of)
        norm = parallel.clip_grad_norm(
            [p for group in self.optimizer.param_groups for p in group["params"]], optimizer.clip
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.objective)
        return _means(losses) | {"grad_norm": norm.item(), "lr": lr}

    @torch.no_grad()
    def validate(
        self, microbatches: Sequence[tuple[int, np.ndarray]], bounds: Bounds
    ) -> dict[str, float]:
        """Metrics of the averaged weights on numbered microbatches, at noise that never changes.

        The number of a microbatch says which rows it holds. bounds: of their likelihood, by name;
        their mean is `validation/bound`. All in nats per token.
        """
        module = self.average.module.eval()
        found = _means([self._loss(module, VALIDATION, key, rows) for key, rows in microbatches])
        if bounds:
            nats = [self._bounds(module, bounds, key, rows) for key, rows in microbatches]
            over_all = parallel.mean_over_ranks(_mean(nats))
            found |= over_all | {"bound": sum(over_all.values()) / len(bounds)}
        return {f"validation/{name}": value for name, value in found.items()} | self._of_table()

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
        """The converter's scale and the spread of the table, which long training can collapse."""
        denoiser = self.average.module.denoiser
        if not self.objective.denoiser.table.direction_VD.requires_grad:
            return {}
        table_VD = torch.nn.functional.normalize(parallel.full(denoiser.table.direction_VD), dim=-1)
        found = {f"table/{name}": value for name, value in geometry_report(table_VD).items()}
        return found | {"converter/beta": parallel.full(denoiser.converter.beta).item()}

    def _loss(self, module: Objective, step: int, lane: int, rows_RL: np.ndarray) -> Loss:
        draws = generator(self.config.stream.seed, step, lane, self.device)
        # Dropout, where there is any, draws from torch's own generator.
        torch.manual_seed(draws.initial_seed())
        return module(self._on_device(rows_RL), draws)

    def _on_device(self, rows_RL: np.ndarray) -> Tensor:
        return torch.from_numpy(rows_RL).to(self.device, torch.int64)


def _means(losses: list[Loss]) -> dict[str, float]:
    """Means over this worker's microbatches, then over the workers, which hold equally many."""
    rows = [{"loss": loss.value.detach(), **loss.metrics} for loss in losses]
    return parallel.mean_over_ranks(_mean(rows))


def _mean(rows: Sequence[Mapping[str, float | Tensor]]) -> dict[str, float]:
    return {key: sum(float(row[key]) for row in rows) / len(rows) for key in rows[0]}
