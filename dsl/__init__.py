"""Discrete Stochastic Localization: one denoiser for every SNR, every sampler a path of SNRs.

`README.md` beside this file holds the mathematics, what repeatability needs, and the key to the
texts that docstrings cite, such as 000 and MDLM.
"""

from dsl import calibration, likelihood, paths, recorders
from dsl.chain import ChainDenoiser
from dsl.denoiser import Denoiser, DenoiserConfig
from dsl.dit import DiT, DiTConfig
from dsl.errors import AdaptationError, PathError, TextError, VocabularyError, WeightsError
from dsl.exact import ExactDenoiser
from dsl.hidden import HiddenChainDenoiser
from dsl.huggingface import from_transformers
from dsl.mdlm import from_mdlm
from dsl.posterior import Posterior
from dsl.sampling import Sample, sample
from dsl.state import State
from dsl.vocabulary import Vocabulary
from dsl.weights import load, save

__all__ = [
    "AdaptationError",
    "ChainDenoiser",
    "Denoiser",
    "DenoiserConfig",
    "DiT",
    "DiTConfig",
    "ExactDenoiser",
    "HiddenChainDenoiser",
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
    "from_transformers",
    "likelihood",
    "load",
    "paths",
    "recorders",
    "sample",
    "save",
]
