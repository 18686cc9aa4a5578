"""One command that checks on a GPU what tests can only check on a CPU, and measures how fast it is.

`pipelines/benchmarks/GPU.md` says how to run it and how to read its table.
"""

SCRATCH = "scratch"  # a stage's own files, in the folder of the report
