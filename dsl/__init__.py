"""Discrete Stochastic Localization: one denoiser for every SNR, every sampler a path of SNRs."""

from dsl import calibration, likelihood, paths, recorders
from dsl.backbone import DiT, DiTConfig
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.errors import VocabularyError, WeightsError
from dsl.exact import ExactDenoiser
from dsl.mdlm import from_mdlm
from dsl.posterior import Posterior
from dsl.sampling import Sample, sample
from dsl.state import State
from dsl.vocabulary import Vocabulary
from dsl.weights import load, save

__all__ = [
    "Denoiser",
    "DenoiserConfig",
    "DiT",
    "DiTConfig",
    "ExactDenoiser",
    "Posterior",
    "Sample",
    "State",
    "Vocabulary",
    "VocabularyError",
    "WeightsError",
    "calibration",
    "from_mdlm",
    "likelihood",
    "load",
    "paths",
    "recorders",
    "sample",
    "save",
]
