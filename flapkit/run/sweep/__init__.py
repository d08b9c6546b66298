"""Sweeps: one recipe with many values, calibrated once.

- ``schema``: what a sweep's file says.
- ``load``: its points, each a recipe that is known to be right.
- ``run``: carry them out on one dense model.
- ``results``: the rows, written as they come and found again.
- ``table`` and ``plot``: what is made of the rows.
"""
