"""Evaluation of models in memory: perplexity, zero-shot tasks, generated samples, and speed.

Nothing here loads models or reads recipes. Every result carries what is needed to compare it with another: the
protocol, a hash of the text, the number of items.

- ``perplexity``: cross-entropy and perplexity as a torchmetrics metric.
- ``protocol``: how a perplexity was measured; bits per byte.
- ``batch_size``: choose a batch size, and halve it when memory runs out.
- ``zero_shot``: load tasks, and arrange the scores of several models.
- ``harness``: run lm-eval on a model.
- ``local_tasks``: the seven tasks of FLAP's paper from local files.
- ``scores``: the scores of a task.
- ``significance``: McNemar's test of two models on the same items.
- ``samples``: continue prompts.
- ``block_table``: the table of block timings of a model on this machine.
- ``speed``: latency, throughput, memory and multiply-accumulates.
"""
