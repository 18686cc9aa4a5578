"""Many devices compute what one computes: lanes, averages, clipping, precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from infra import parallel
from infra.parallel import ParallelConfig
from tests.infra.workers import Toy, Trained, batch, full, in_workers

FLOAT32 = ParallelConfig(compute_dtype="float32", threads=1)


def train(steps: int, config: ParallelConfig = FLOAT32) -> dict[str, Any]:
    with parallel.join(config) as mesh:
        run = Trained(mesh, config)
        losses = [[loss.item() for loss in run.step(step)] for step in range(steps)]
        return {
            "losses": losses,
            "model": full(run.model.named_parameters()),
            "average": full(run.average.module.named_parameters()),
        }


def plain(steps: int, decay: float = 0.9) -> dict[str, Any]:
    """The same training by hand, on one device, without any of the machinery."""
    model = Toy()
    average: dict[str, torch.Tensor] = {}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for step in range(steps):
        lanes = [model(*batch(step, lane)) for lane in range(2)]
        (sum(lanes) / 2).backward()
        norm = torch.stack([p.grad.norm() for p in trainable]).norm()
        for p in trainable:
            p.grad *= min(1.0, 1.0 / norm)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            average[name] = p.detach() + decay * (average.get(name, p.detach()) - p.detach())
        losses.append([loss.item() for loss in lanes])
    return {
        "losses": losses,
        "model": full(model.named_parameters()),
        "average": full(average.items()),
    }


@pytest.fixture
def like_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker shards, gathers and casts as one of several does."""
    monkeypatch.setattr(parallel, "shared", lambda mesh: True)


def close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-6, rtol=0, err_msg=name)


def test_one_worker_two_workers_and_no_machinery_train_alike() -> None:
    by_hand, alone, ranks = plain(5), train(5), in_workers(2, train, 5)
    assert by_hand["losses"][0] == alone["losses"][0]
    assert alone["losses"][0] == ranks[0]["losses"][0] + ranks[1]["losses"][0]
    together = [a + b for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    np.testing.assert_allclose(together, alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(by_hand["losses"], alone["losses"], rtol=1e-5)
    for part in ("model", "average"):
        close(by_hand[part], alone[part])
        close(alone[part], ranks[0][part])
    frozen = full(Toy().named_parameters())["mix.weight"]
    assert (ranks[0]["model"]["mix.weight"] == frozen).all()


def test_a_run_repeats_bit_for_bit() -> None:
    first, second = train(3), train(3)
    assert first["losses"] == second["losses"]
    assert all((first["model"][k] == second["model"][k]).all() for k in first["model"])


@pytest.mark.usefixtures("like_several")
def test_bf16_computes_in_blocks_and_keeps_float32_masters() -> None:
    config = ParallelConfig(compute_dtype="bfloat16")
    with parallel.join(config) as mesh:
        run = Trained(mesh, config)
        tokens_BL, weights_BL = batch(0, 0)
        seen = {}
        run.model.register_forward_pre_hook(lambda _, args: seen.update(weights=args[1].dtype))
        loss = run.model(tokens_BL, weights_BL)
        loss.backward()
        assert seen["weights"] == torch.float32  # the root's inputs are not rounded
        assert set(run.model.blocks[0].seen) == {torch.bfloat16}
        assert {p.dtype for p in run.model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
        assert loss.item() != Toy()(tokens_BL, weights_BL).item()
        assert loss.item() == pytest.approx(Toy()(tokens_BL, weights_BL).item(), rel=1e-2)
        for step in range(3):
            run.step(step)


@pytest.mark.usefixtures("like_several")
def test_lanes_are_summed_in_float32_and_reduced_once() -> None:
    config = ParallelConfig(compute_dtype="bfloat16")
    with parallel.join(config) as mesh:
        run = Trained(mesh, config)
        lanes = [batch(0, lane) for lane in range(2)]
        each = []
        for lane in lanes:
            parallel.accumulate(run.model, [lane], lambda lane: run.model(*lane))
            each.append(run.model.head.weight.grad.full_tensor().clone())
            run.optimizer.zero_grad()
        unreduced = []

        def loss_of(lane: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            unreduced.append(run.model.head.weight.grad is None)
            return run.model(*lane)

        parallel.accumulate(run.model, lanes, loss_of)
        assert unreduced == [True, True]  # one reduction, after the last lane
        both = run.model.head.weight.grad.full_tensor()
        torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=1e-6, atol=1e-9)


def test_auto_is_float32_on_a_cpu_and_bf16_on_a_gpu() -> None:
    assert ParallelConfig().dtype(torch.device("cpu")) == torch.float32
    assert ParallelConfig().dtype(torch.device("cuda")) == torch.bfloat16


compile_block = nn.Module.compile


@pytest.mark.parametrize("compile", [False, True])
def test_checkpointing_and_compile_change_neither_gradients_nor_names(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def trace(block: nn.Module) -> None:  # without code generation: the order is what is tested
        compiled.append(block)
        compile_block(block, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    gradients = {}
    for config in (
        FLOAT32,
        ParallelConfig(compute_dtype="float32", activation_checkpointing=True, compile=compile),
    ):
        with parallel.join(config) as mesh:
            run = Trained(mesh, config)
            run.model(*batch(0, 0)).backward()
            names = [name for name, _ in run.model.named_parameters()]
            assert names == [name for name, _ in Toy().named_parameters()]
            gradients[config] = full(
                (name, p.grad) for name, p in run.model.named_parameters() if p.requires_grad
            )
            if not compile:
                calls = len(run.model.blocks[0].seen)
                assert calls == (2 if config.activation_checkpointing else 1)
    close(*gradients.values())
    assert len(compiled) == (6 if compile else 0)  # three of the model, three of its average


def test_checkpointed_blocks_are_really_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_block(block, backend=backend))
    root = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    config = ParallelConfig(activation_checkpointing=True, compile=True)
    with parallel.join(config) as mesh:
        parallel.shard(root, root[:1], mesh=mesh, config=config)
        root(torch.ones(1, 3)).backward()
    assert len(graphs) == 1


@pytest.mark.usefixtures("like_several")
def test_validation_leaves_shards_behind() -> None:
    config = ParallelConfig(compute_dtype="bfloat16", threads=1)
    with parallel.join(config) as mesh:
        run = Trained(mesh, config)
        run.step(0)
        with torch.no_grad():
            run.average.module(*batch(9, 0))
        run.step(1)  # the average is updated in place: it must be sharded like the model
        assert {type(p.data) for p in run.average.module.parameters()} == {DTensor}


@pytest.mark.parametrize("deterministic", [True, False])
def test_operations_that_do_not_repeat_are_an_error_only_where_asked(deterministic: bool) -> None:
    """As a mere warning, a GPU's attention would not repeat and nobody would be told."""
    before = torch.are_deterministic_algorithms_enabled()
    with parallel.join(ParallelConfig(deterministic=deterministic)):
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.are_deterministic_algorithms_enabled() is before


@pytest.mark.parametrize(
    ("rank", "shown", "number"),
    [(None, 4, 2), ("0", 4, 0), ("3", 4, 3), ("3", 1, 0), ("5", 4, 1)],
    ids=["no launcher", "first", "last", "its own alone", "more processes than GPUs"],
)
def test_every_process_of_a_machine_takes_its_own_gpu(
    rank: str | None, shown: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: shown)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert parallel.device() == torch.device("cuda", number)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 3090", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_peak_is_that_of_the_card(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert parallel.peak_flops() == (tflops and tflops * 1e12)


@pytest.mark.usefixtures("like_several")
def test_weights_are_gathered_once_for_all_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    config = ParallelConfig(compute_dtype="bfloat16")
    with parallel.join(config) as mesh:
        run = Trained(mesh, config)
        groups = 1 + len(run.model.blocks)
        gathered: list[int] = []
        unshard = FSDPParamGroup.unshard

        def counted(group: FSDPParamGroup, *args: Any) -> None:
            begun = group.is_unsharded or group._all_gather_result is not None
            gathered.append(not begun)
            unshard(group, *args)

        monkeypatch.setattr(FSDPParamGroup, "unshard", counted)
        lanes = [batch(0, lane) for lane in range(4)]
        parallel.accumulate(run.model, lanes, lambda lane: run.model(*lane))
        # For the first lane's forward pass and, as the last one frees them, its backward pass.
        assert sum(gathered) == 2 * groups
        assert {type(p.data) for p in run.model.parameters()} == {DTensor}
        together = full((n, p.grad) for n, p in run.model.named_parameters() if p.requires_grad)
        run.optimizer.zero_grad()
        for lane in lanes:  # gathered and reduced for each
            parallel.accumulate(run.model, [lane], lambda lane: run.model(*lane) / len(lanes))
        each = full((n, p.grad) for n, p in run.model.named_parameters() if p.requires_grad)
        close(together, each)


def test_numbers_below_the_smallest_are_zero_for_as_long_as_asked() -> None:
    tiny = torch.full((3,), 1e-40)
    with parallel.flushed():
        assert not (tiny * 0.5).any()
    assert (tiny * 0.5).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_worker_has_nothing_to_shard(dtype: Any) -> None:
    config = ParallelConfig(compute_dtype=dtype)
    with parallel.join(config) as mesh:
        run = Trained(mesh, config)
        run.step(0)
        assert {type(p.data) for p in run.model.parameters()} == {torch.Tensor}
        assert parallel.gathered(run.model, lambda: 3) == 3


def test_clipping_reports_the_norm_before_and_scales_to_the_limit() -> None:
    toy = Toy()
    toy(*batch(0, 0)).backward()
    trainable = [p for p in toy.parameters() if p.requires_grad]
    expected = torch.stack([p.grad.norm() for p in trainable]).norm()
    with parallel.join(FLOAT32) as mesh:
        model = Toy()
        parallel.shard(model, model.blocks, mesh=mesh, config=FLOAT32)
        model(*batch(0, 0)).backward()
        norm = parallel.clip_grad_norm(model.parameters(), 0.01)
        assert type(norm) is torch.Tensor
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(
            parallel.clip_grad_norm(model.parameters(), 1.0), torch.tensor(0.01)
        )


def mean_of_rank() -> dict[str, float]:
    rank, size = parallel.world()
    assert size == dist.get_world_size()
    found = {"rank": rank, "third": torch.tensor(1 / 3, dtype=torch.float64)}
    return dict(parallel.mean_over_ranks(found))


def test_scalars_are_averaged_in_float64() -> None:
    expected = {"rank": 0.5, "third": 1 / 3}
    assert in_workers(2, mean_of_rank) == [expected, expected]
    assert parallel.mean_over_ranks({"x": 1 / 3}) == {"x": 1 / 3}


def test_a_bare_process_is_a_world_of_one_for_the_duration() -> None:
    before = torch.get_num_threads()
    with parallel.join(ParallelConfig(threads=1)) as mesh:
        assert (mesh.size(), parallel.world()) == (1, (0, 1))
        assert parallel.device() == torch.device("cpu")
        assert torch.get_num_threads() == 1
    assert not dist.is_initialized()
    assert parallel.world() == (0, 1)
    torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "found"), [({}, "AUTO"), ({"MKL_CBWR": "AVX2"}, "AVX2")])
def test_every_process_of_ours_has_mkl_repeat_itself(given: dict[str, str], found: str) -> None:
    """Whoever imports any room of `infra`, as verbs, Ray workers and pool processes do."""
    env = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"} | given
    root = Path(parallel.__file__).parents[1]
    code = "import infra.pool, os; print(os.environ['MKL_CBWR'])"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=env, text=True, cwd=root).strip() == found
