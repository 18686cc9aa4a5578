"""Object stores, shards, FSDP2, checkpoints, MLflow and Ray; nothing of the science.

Importing this package sets `MKL_CBWR`, which MKL reads at its first matrix product. Without it, on
CPUs with AVX2 alone, the last bit of a product depends on the memory addresses of its operands, and
a run that resumes could differ from one that never stopped. `AUTO` costs no speed. Every verb, Ray
worker and pool process imports `infra` before it computes anything. A value that is already set is
kept.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO")
