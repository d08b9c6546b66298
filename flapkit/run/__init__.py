"""Runs: from a recipe to its output folder. The packages below take no recipe.

``pipeline.run`` is the sequence of stages; ``executors`` opens the recipe's model.

Modules:
    bench: time checkpoints
    block_times: the time that each unit takes on this machine
    budget: what a recipe's budget means for its model
    captured: collect the warnings of a run
    check: what a recipe will do, without running it
    engines: llama.cpp and vLLM, to time them
    estimate: memory, disk and compute of a run
    pace: how fast this machine multiplies matrices
    evaluate: evaluate a checkpoint
    executors: open a recipe's model: whole, layer by layer, sharded
    lengths: the lengths of all sequences that a recipe runs through its model
    ledger: what a model costs before and after
    journal: log figures as stages finish
    checkpoint_files: read the files of a pruned checkpoint
    pipeline: run a recipe
    run_record: the results of a run, and its output folder
    presets: which preset a recipe is, and what a better one would cost
    recover: train a pruned checkpoint
    samples: samples and site errors for the report
    shortfall: why a pruned model is slower than expected
    target: the model's sites, from its configuration
    tasks: zero-shot tasks
    text: a run's text as tokens
    vllm_worker: run a model in vLLM, without flapkit
    report: the HTML page and the figures
    sweep: many points from one calibration
"""
