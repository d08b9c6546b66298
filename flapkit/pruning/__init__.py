"""The method: statistics, scores, plans and corrections, as functions that know neither recipes nor what holds weights.

Components (metrics, searchers, compensators) are interfaces here; the defaults are plugins. What runs the model and
applies a plan is an executor, in ``flapkit.execution``.

Modules:
    collector: measure the consumers' inputs while batches run
    components: the interfaces of metrics, searchers and compensators
    experts: see what the experts of a mixture take in
    method: scores, plan and corrections from statistics
    ranking: from scores to a plan, what searchers share
    recovery: the training that a compensator describes
    rounding: round a plan's widths
    sequential: repair layer by layer, each site after those before it
    site_errors: how far a consumer's output moves, predicted and measured
    statistics: what calibration measures
    trials: the perplexity that searchers with trials go by
"""
