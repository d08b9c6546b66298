"""Execution: executors, which hold a model's weights and run them, and the pruning algorithm.

``executor.prune_`` is the algorithm; ``whole`` and ``layerwise`` are the two executors. Nothing here takes a recipe.

Modules:
    cache: statistics of earlier runs
    executor: the interface of executors, and `prune_`
    layer_trials: try plans layer by layer
    layerwise: one decoder layer in memory at a time
    needs: memory, disk and passes, computed from sizes
    record_files: the file format of the cache and of unfinished runs
    resume: reuse what an interrupted run has finished
    runtime: run a model over text with Lightning
    shards: shard a model over processes, for evaluation and recovery
    stream: run decoder layers one at a time
    student: the pruned model that a recovery trains
    training: run a recovery
    whole: the whole model in memory
    lightning: everything that imports Lightning
"""
