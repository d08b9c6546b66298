"""The method: statistics, scores, plans and corrections, as functions independent of recipes and executors.

Components (metrics, searchers, compensators) are interfaces here; the defaults are plugins. Executors, which run the
model and apply a plan, are in ``flapkit.execution``.

Modules:
    budget_keys: what a budget is asked for by
    budgets: what a budget means for a model
    collector: measure the consumers' inputs while batches run
    components: the interfaces of metrics, searchers and compensators
    experts: observe the consumers of a mixture's experts
    algorithm: scores, plan and corrections from statistics
    knapsack: the plan with the smallest sum of scores
    ranking: from scores to a plan; shared by searchers
    recovery: the training that a compensator describes
    rounding: round a plan's widths
    sequential: repair one site after another, in one sweep over the layers
    site_errors: the error of a consumer's output, predicted and measured
    statistics: what calibration measures
    trials: the objectives of trial searchers
    unit_choice: the attention unit that `unit: auto` leaves open
"""
