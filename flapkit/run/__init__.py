"""Runs: a recipe from its first word to its output folder. Nothing below this package takes a recipe.

``pipeline.run`` puts the stages in a row; ``executors`` opens what the recipe names.

Modules:
    bench: time checkpoints
    captured: collect the warnings of a run
    check: what a recipe will do, without running it
    estimate: what a run takes
    evaluate: evaluate a checkpoint
    executors: open a recipe's model: whole, layer by layer, sharded
    journal: log figures as stages finish
    origin: what a pruned checkpoint says of its making
    pipeline: run a recipe
    record: what a run leaves, and its output folder
    recover: train a pruned checkpoint
    samples: samples and site errors for the report
    target: the model's sites, from its configuration
    tasks: zero-shot tasks
    text: a run's text as tokens
    report: the HTML page and the figures
    sweep: many points from one calibration
"""
