"""The method: statistics, scores, plans and corrections, as functions independent of recipes and executors.

Components (metrics, searchers, compensators) are interfaces here; the defaults are plugins. Executors, which run the
model and apply a plan, are in ``flapkit.execution``.

Modules:
    algorithm: scores, plan and corrections from statistics
    angles: the angles by which layers turn the hidden states
    budget_keys: what a budget is asked for by
    budgets: what a budget means for a model
    collector: measure the consumers' inputs while batches run
    components: the interfaces of metrics, searchers and compensators
    contributions: what the experts of a mixture contribute
    experts: observe the consumers of a mixture's experts
    gates: the gates that a searcher trains
    gram: the covariance of the channels
    knapsack: the plan with the smallest sum of scores
    moments: means and variances of the channels
    ranking: from scores to a plan; shared by searchers
    recovery: the training that a compensator describes
    rounding: round a plan's widths
    sequential: repair one site after another, in one sweep over the layers
    site_errors: the error of a consumer's output, predicted and measured
    statistics: the interface of what calibration measures
    trials: the objectives of trial searchers
    unit_choice: the attention unit that `unit: auto` leaves open
"""
