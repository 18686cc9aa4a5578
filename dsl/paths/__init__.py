"""Sampling algorithms as paths of per-token SNR (000 §4.3).

A path says where each gamma goes next and nothing else: it never touches z, tokens or the
randomness of a draw. All of them are frozen dataclasses told apart by ``kind``, so that presets,
sweeps and run records hold them as plain values.
"""

from dsl.paths.clock import Clock, Path
from dsl.paths.entropy_bounded import EntropyBounded
from dsl.paths.grids import Grid, Information, Linear, Log, Quantile
from dsl.paths.hybrid import Hybrid
from dsl.paths.masked import Masked
from dsl.paths.order import Order
from dsl.paths.remask import Remask
from dsl.paths.second_order import SecondOrder
from dsl.paths.sentence_sde import SentenceSDE
from dsl.paths.stage import Stage
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
]
