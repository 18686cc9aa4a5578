"""Sampling algorithms as paths of per-token SNR (000 §4.3).

A path says where each gamma goes next and nothing else: it never touches z, tokens or the
randomness of a draw. All of them are frozen dataclasses told apart by ``kind``, so that presets,
sweeps and run records hold them as plain values.
"""

from dsl.paths.clock import Clock, Path
from dsl.paths.hybrid import Hybrid
from dsl.paths.masked import Masked
from dsl.paths.sentence_sde import SentenceSDE

# The closed union that presets and sweeps hold, and the part of it that Hybrid can join.
Stage = Masked | SentenceSDE
AnyPath = Stage | Hybrid

__all__ = ["AnyPath", "Clock", "Hybrid", "Masked", "Path", "SentenceSDE", "Stage"]
