"""The world outside: object stores, shards, FSDP2, checkpoints, MLflow, Ray.

Importing this package sets `MKL_CBWR`, which MKL reads at its first matrix product. Without it the
last bit of a product depends, on CPUs with AVX2 alone, on where its operands lie in memory, and a
run that resumes could differ from one that never stopped. `AUTO` costs no speed. Every verb, Ray
worker and pool process imports `infra` before it computes anything; a value that is set already
is left as it is.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO")
