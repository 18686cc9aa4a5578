"""What a curve of quality against diversity says at the diversity of real text.

Texts get better and less diverse as the temperature falls, so a judge's figure compares models only
where their texts are equally diverse: at the diversity of real text, interpolated linearly between
the two temperatures that bracket it. The line lies above a curve that bends upwards: temperatures
.15 to .2 apart add about .02 bits per byte in the middle, closer ones less, so no difference below
.03 should lean on it.

Shapes: T temperatures (ascending), R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.gate import percentiles


@dataclass(frozen=True)
class Crossing:
    """Where a curve has a diversity, in each of 1 + R resamples, the first of which is the texts
    as they are.

    lower_R: the number of the temperature below. weight_R: of the next temperature, in [0, 1]; NaN
    where the curve does not reach that diversity. gap_T: how far the texts as they are lie above
    it at each temperature.
    """

    lower_R: np.ndarray
    weight_R: np.ndarray
    gap_T: np.ndarray

    @property
    def reached(self) -> bool:
        """Whether the texts as they are reach it."""
        return math.isfinite(self.weight_R[0])

    @property
    def lost(self) -> int:
        """In how many resamples it is not reached."""
        return int(np.isnan(self.weight_R[1:]).sum())

    @property
    def said(self) -> str:
        """Whether the texts as they are reach it, and where they lie if they do not."""
        if self.reached:
            return "yes" if len(self.gap_T) > 1 else "cannot be told apart"
        return "no, less diverse" if self.gap_T[-1] < 0 else "no, more diverse"

    def of(self, values_TR: np.ndarray) -> np.ndarray:
        """Another figure of the curve there, ``[1 + R]``; NaN where it is not reached."""
        resample_R = np.arange(len(self.lower_R))
        next_R = np.minimum(self.lower_R + 1, len(values_TR) - 1)
        lower_R, upper_R = values_TR[self.lower_R, resample_R], values_TR[next_R, resample_R]
        return (1 - self.weight_R) * lower_R + self.weight_R * upper_R


def crossing(diversity_TR: np.ndarray, target_R: np.ndarray, confidence: float) -> Crossing:
    """Where a curve has the diversity ``target_R``, by ``diversity_TR`` at each temperature.

    It lies between two neighbouring temperatures of which the hotter has the more diverse texts;
    of several such pairs, the hottest counts. Where heat makes texts less diverse, the colder ones
    have fallen apart, and their quality says nothing of the model. A curve of one temperature
    reaches it where the difference of the two diversities cannot be told from 0: where its interval
    at ``confidence`` holds 0.
    """
    gap_TR = diversity_TR - target_R
    if len(gap_TR) == 1:
        low, high = percentiles(gap_TR[0, 1:], confidence)
        weight_R = np.full(gap_TR.shape[1], 0.0 if low <= 0 <= high else math.nan)
        return Crossing(np.zeros(len(weight_R), int), weight_R, gap_TR[:, 0])
    below_TR, above_TR = gap_TR[:-1], gap_TR[1:]
    rises_TR = (below_TR <= 0) & (above_TR >= 0)
    lower_R = len(rises_TR) - 1 - rises_TR[::-1].argmax(0)
    resample_R = np.arange(len(lower_R))
    from_R, to_R, found_R = (of[lower_R, resample_R] for of in (below_TR, above_TR, rises_TR))
    # No width: both temperatures have the very diversity.
    width_R = np.where(to_R > from_R, to_R - from_R, 1)
    return Crossing(lower_R, np.where(found_R, -from_R / width_R, math.nan), gap_TR[:, 0])
