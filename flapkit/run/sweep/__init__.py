"""Sweeps: one recipe with many settings, calibrated once.

Each point of a sweep is a valid recipe. Points run on copies of one dense model; each gives a row of the results.

Modules:
    load: read a sweep's file and build its points
    plot: the rows as a plot
    point: run one point
    results: the rows in `results.jsonl`, from which an interrupted sweep resumes
    run: run the points, and write the table and the plot
    schema: the keys of a sweep's file
    table: the rows as a table
"""
