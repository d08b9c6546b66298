"""Execution: what holds a model's weights and runs them, and the algorithm that is written against it.

``executor.prune_`` is the whole of pruning; ``whole`` and ``layerwise`` are the two executors. Nothing here knows a
recipe.

Modules:
    cache: statistics that were measured before
    executor: the interface of executors, and `prune_`
    layerwise: one decoder layer in memory at a time
    needs: memory, disk and passes, from sizes alone
    records: the one format of what is kept on the disk
    resume: what an interrupted run has finished
    runtime: run a model over text under Lightning
    shards: shard a model over processes, for evaluation and recovery
    stream: run decoder layers one at a time
    student: the pruned model that a recovery trains
    training: the recovery itself
    whole: the model in memory
    lightning: everything that imports Lightning
"""
