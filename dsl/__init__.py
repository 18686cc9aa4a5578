"""Discrete Stochastic Localization: one denoiser for every SNR, every sampler a path of SNRs.

Results are repeatable bit for bit on one type of machine at one number of threads. On x86 CPUs
without AVX-512 this needs `MKL_CBWR=AUTO` in the environment before the first matrix product:
otherwise MKL's last bit depends on where operands lie in memory.
"""

from dsl import calibration, likelihood, paths, recorders
from dsl.backbone import DiT, DiTConfig
from dsl.chain import ChainDenoiser
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.errors import PathError, TextError, VocabularyError, WeightsError
from dsl.exact import ExactDenoiser
from dsl.mdlm import from_mdlm
from dsl.posterior import Posterior
from dsl.sampling import Sample, sample
from dsl.state import State
from dsl.vocabulary import Vocabulary
from dsl.weights import load, save

__all__ = [
    "ChainDenoiser",
    "Denoiser",
    "DenoiserConfig",
    "DiT",
    "DiTConfig",
    "ExactDenoiser",
    "PathError",
    "Posterior",
    "Sample",
    "State",
    "TextError",
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
