"""A toy model and the processes to train it in."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from infra import parallel
from infra.checkpoints import Checkpoints
from infra.parallel import ParallelConfig

WIDTH, TOKENS = 8, 11  # 11 rows do not divide by two workers


def in_workers(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` in `size` processes of one gloo group; what each rank returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.infra.workers", "infra.checkpoints"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, context) as pool:
        store = f"{folder}/store"
        calls = [pool.submit(_ranked, store, rank, size, function, args) for rank in range(size)]
        return [call.result() for call in calls]


def _ranked(path: str, rank: int, size: int, function: Callable[..., Any], args: Any) -> Any:
    store = dist.FileStore(path, size)
    wait = timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.seen: list[torch.dtype] = []

    def forward(self, x_BLW: Tensor) -> Tensor:
        self.seen.append(x_BLW.dtype)
        return x_BLW + self.down(F.gelu(self.up(x_BLW)))


class Toy(nn.Module):
    """Table, blocks, head; a frozen matrix and a single number, which only one rank can hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens_BL: Tensor, weights_BL: Tensor) -> Tensor:
        x_BLW = self.mix(self.table(tokens_BL)) * self.scale
        for block in self.blocks:
            x_BLW = block(x_BLW)
        logits_BLV = self.head(x_BLW.to(self.head.weight.dtype)).float()
        losses_BL = F.cross_entropy(logits_BLV.mT, tokens_BL.roll(1, -1), reduction="none")
        return (losses_BL * weights_BL).mean()


class Trained:
    """The toy, its average and its optimizer, sharded over a mesh."""

    def __init__(self, mesh: DeviceMesh, config: ParallelConfig, decay: float = 0.9) -> None:
        self.model = Toy()
        self.average = parallel.averaged(self.model, decay)
        for toy in (self.model, self.average.module):
            parallel.shard(toy, toy.blocks, mesh=mesh, config=config)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-2)

    def step(self, step: int, num_lanes: int = 2) -> list[Tensor]:
        """One step over this rank's lanes; the loss of each."""
        rank, size = parallel.world()
        lanes = [batch(step, lane) for lane in range(rank, num_lanes, size)]
        losses = parallel.accumulate(self.model, lanes, lambda lane: self.model(*lane))
        parallel.clip_grad_norm(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        return losses


class Patient(Checkpoints):
    """Each of whose checkpoints is judged before training goes on."""

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        super().save(step, tensors, meta)
        self.wait()


def batch(step: int, lane: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + lane)
    tokens_BL = torch.randint(TOKENS, (4, 6), generator=generator)
    return tokens_BL, torch.rand(4, 6, generator=generator)


def full(named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Whole tensors as arrays, which travel between processes."""
    return {name: parallel.full(tensor).numpy() for name, tensor in named}
