"""How the two embedded models were made: `python -m pretraining.segmenter` and `python -m pretraining.base`.

Not part of the installed package. Both draw their own scenes; what was tried is in `benchmarks/LOG.md`.
"""
