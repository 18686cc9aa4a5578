"""Sampling algorithms as paths of per-token SNR (000 §4.3).

A path answers where each gamma goes next. It never changes z or tokens, and has no part in their
random draws; only one that steers (`dsl.paths.clock.Steers`) sets the drift of a move. All paths
are frozen dataclasses told apart by ``kind``, so that presets, sweeps and run records hold them as
plain values.
"""

from collections.abc import Mapping
from typing import Any

from dsl import plain
from dsl.errors import PathError
from dsl.paths.clock import Clock, Path
from dsl.paths.entropy_bounded import EntropyBounded
from dsl.paths.grids import Grid, Information, Linear, Log, Quantile
from dsl.paths.hybrid import Hybrid, Stage
from dsl.paths.masked import Masked
from dsl.paths.order import Order
from dsl.paths.remask import Remask
from dsl.paths.second_order import SecondOrder
from dsl.paths.sentence_sde import SentenceSDE
from dsl.paths.token_sde import TokenSDE

# The closed union that presets and sweeps hold.
AnyPath = Stage | Hybrid

__all__ = [
    "AnyPath",
    "Clock",
    "EntropyBounded",
    "Grid",
    "Hybrid",
    "Information",
    "Linear",
    "Log",
    "Masked",
    "Order",
    "Path",
    "Quantile",
    "Remask",
    "SecondOrder",
    "SentenceSDE",
    "Stage",
    "TokenSDE",
    "choose",
    "from_dict",
]

LEFT_TO_RIGHT = Order("left_to_right")


def from_dict(spec: str | Mapping[str, Any]) -> AnyPath:
    """The path that ``{"kind": "sentence_sde", "gamma_max": 30}`` describes, or a kind alone.

    Raises:
        ValueError: see `dsl.plain.read`.
    """
    path: AnyPath = plain.read(AnyPath, spec, "path")
    return path


def choose(
    path: AnyPath | None, budget: int | None, *, length: int, causal: bool
) -> tuple[Any, int]:
    """The path to walk, and the calls to spend, on rows of ``length`` tokens.

    The default path is left to right for a causal denoiser and `Masked` for any other. The default
    budget is the sum of the split for a `Hybrid`, and one call per token for any other path.

    Raises:
        PathError: a causal denoiser is asked for another order, or the budget is not the sum of the
            split.
    """
    path = path or (LEFT_TO_RIGHT if causal else Masked())
    if causal and path != LEFT_TO_RIGHT:
        raise PathError(
            f"an autoregressive model reads from left to right, but the path is {path.kind}; "
            "leave the path out"
        )
    if not isinstance(path, Hybrid):
        return path, budget or length
    calls = sum(path.split)
    if budget and budget != calls:
        before, after = path.split
        raise PathError(
            f"the path splits {before} + {after} = {calls} calls but the budget is {budget}; "
            "leave the budget out"
        )
    return path, calls
