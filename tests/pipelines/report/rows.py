"""Rows as an evaluation makes them, of made-up models."""

from __future__ import annotations

import math

from pipelines.report import Row

ANCHORS = {"unigram": 0.01, "real": 0.95}


def texts(models: int = 2, paths: int = 3, budgets: tuple[int, ...] = (16, 64, 256)) -> list[Row]:
    """Every model on every path at every budget, and the hybrid path with four splits."""
    rows: list[Row] = [
        {"model": f"model {m}", "path": f"path {p}", "budget": budget, "calls": float(budget)}
        | {"mauve": 0.1 + 0.1 * m + 0.05 * p + budget / 1000, "mauve_stderr": 0.02}
        | {"perplexity": 1000.0 / budget, "perplexity_stderr": math.nan}
        for m in range(models)
        for p in range(paths)
        for budget in budgets
    ]
    return rows + [
        {"model": f"model {m}", "path": "hybrid", "budget": sum(split), "split": split}
        | {"calls": float(sum(split)), "mauve": 0.001 * (split[0] + 2 * split[1]) + 0.1 * m}
        for m in range(models)
        for split in ([16, 16], [16, 32], [32, 16], [32, 32])
    ]


def frontier(models: int = 2, paths: int = 2, budgets: tuple[int, ...] = (16, 64)) -> list[Row]:
    """Every model on every path at every budget and three temperatures, and what stands beside:
    real text, texts nearby at two temperatures, and texts far away."""
    walks: list[Row] = [
        {"model": f"model {m}", "path": f"path {p}", "budget": budget, "temperature": temperature}
        | {"diversity": 2 * temperature, "bits": 1 + m + temperature + p / 4, "bits_stderr": 0.1}
        for m in range(models)
        for p in range(paths)
        for budget in budgets
        for temperature in (0.6, 0.8, 1.0)
    ]
    return [
        {"model": "real", "diversity": 1.7, "bits": 1.0, "bits_stderr": 0.1},
        {"model": "near", "temperature": 0.8, "diversity": 1.5, "bits": 1.5},
        {"model": "near", "temperature": 1.0, "diversity": 1.7, "bits": 1.6},
        {"model": "far", "diversity": 0.0, "bits": 9.0},
        *walks,
    ]


def calibration(models: int = 2, gammas: tuple[float, ...] = (1.0, 100.0)) -> list[Row]:
    edges = [0.05 + 0.1 * k for k in range(10)]
    return [
        {"model": f"model {m}", "gamma": gamma, "ece": 0.125, "count": [0, *range(1, 10)]}
        | {"confidence": [None, *edges[1:]], "accuracy": [None, *(e**2 for e in edges[1:])]}
        for m in range(models)
        for gamma in gammas
    ]


def traces(models: int = 2, budgets: tuple[int, ...] = (8, 32)) -> list[Row]:
    return [_trace(f"model {m}", T) for m in range(models) for T in budgets]


def _trace(model: str, budget: int) -> Row:
    """Half of the walk gathers evidence, half of it reveals; two steps of three take back."""
    done = [(step + 1) / budget for step in range(budget)]
    revealed = [max(0.0, 2 * share - 1) for share in done]
    masked = [max(0.0, 1 - 2 * share) for share in done]
    return {
        "model": model,
        "path": "remask",
        "budget": budget,
        "masked": masked,
        "revealed": revealed,
        "evidence": [1 - m - r for m, r in zip(masked, revealed, strict=True)],
        "remasked": [0.1 * (step % 3 > 0) for step in range(budget)],
        "rewritten": [0.25] * budget,
        "max_prob": [*done[:-1], None],
        "nucleus_size": [*(1000 ** (1 - share) for share in done[:-1]), None],
        "entropy": [*(5 * (1 - share) for share in done[:-1]), math.nan],
    }


def likelihood(models: int = 2) -> list[Row]:
    return [
        row
        for m in range(models)
        for row in (
            {"model": f"model {m}", "view": "endpoint_bound", "nats_per_token": 3.5 + m}
            | {"bits_per_byte": 1.5 + m, "perplexity": 33.0, "perplexity_stderr": 0.5},
            *(
                {"model": f"model {m}", "view": f"hybrid_bound_{gamma:g}", "gamma_star": gamma}
                | {"nats_per_token": 3.4 + m + 2 / gamma, "nats_per_token_stderr": 0.1}
                | {"bits_per_byte": 1.4 + m, "perplexity": 31.0}
                for gamma in (10.0, 30.0, 100.0)
            ),
        )
    ]


def states(models: int = 2) -> list[Row]:
    return [
        {"model": f"model {m}", "gamma": gamma, "nats": 5 / (1 + gamma), "nats_stderr": 0.1}
        | {"squared_error": 1 / (1 + gamma), "squared_error_stderr": math.nan}
        for m in range(models)
        for gamma in (0.5, 4.0, 32.0)
    ]


def converter(models: int = 2) -> list[Row]:
    return [
        {"model": f"model {m}", "gamma": gamma, "converter_entropy": 3 / (1 + gamma)}
        | {"mask_weight": 1 / (1 + gamma), "token_weight": gamma / (1 + gamma)}
        for m in range(models)
        for gamma in (0.0, 0.5, 4.0, 100.0)
    ]


def course() -> list[Row]:
    return [
        {"step": step, "converter/beta": 1.0 + step, "table/mean_cosine": 0.1 / step}
        | {"table/effective_rank": 8.0 - 1 / step}
        for step in (10, 20, 30)
    ]


def journal(steps: int = 9) -> list[Row]:
    rows: list[Row] = [{"step": step, "loss": 2.0 / step} for step in range(1, steps)]
    return [*rows, {"step": steps}, {"step": steps - 1, "validation/loss": 1.0}]
