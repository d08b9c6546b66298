"""What a report shows: exact sums, and numbers as people write them."""

from __future__ import annotations

import dataclasses

import pytest
from runs import TRAINING, TRIALS, make_run

from flapkit.pruning.site_errors import SiteError
from flapkit.run.report import view
from flapkit.run.report.report_record import SampleRecord


def test_the_ledger_adds_up():
    run = make_run(ratio=0.4)
    *layers, total = view.ledger(run)
    assert total.cells == tuple(sum(column) for column in zip(*(row.cells for row in layers), strict=True))
    assert total.cells[4] == run.result["params"]["removed"]
    rows = view.whole(run)
    *parts, (_, dense, pruned) = rows
    assert sum(before for _, before, _ in parts) == dense == run.result["params"]["dense"]
    assert sum(after for _, _, after in parts) == pruned == run.result["params"]["pruned"]


def test_experts_of_a_layer_are_added_up():
    run = make_run(layers=1)
    first = run.record.sites[1]
    second = dataclasses.replace(first, name="layers.0.experts.1")
    record = dataclasses.replace(run.record, sites=(first, second))
    (row,) = view.structure(record)
    assert (row["units"], row["kept"]) == (2 * first.units, 2 * first.kept)
    scores = view.scores(record)["mlp"]
    assert sum(bar["kept"] for bar in scores["bars"]) == 2 * first.kept
    assert scores["thresholds"] == []


def test_units_are_called_by_what_they_are():
    run = make_run()
    assert view.units(run.record) == {"attention": view.KV_GROUPS, "mlp": view.CHANNELS}
    alone = dataclasses.replace(run.record.sites[0], heads=run.record.sites[0].units)
    assert view.units(dataclasses.replace(run.record, sites=(alone,))) == {"attention": view.HEADS}


def test_errors_are_in_per_cent():
    run = make_run()
    site = dataclasses.replace(run.record.sites[0], error=SiteError(None, 0.25, None))
    (row,) = view.errors(dataclasses.replace(run.record, sites=(site,)))
    assert (row["predicted"], row["alone"], row["in_model"]) == (None, 25.0, None)


def test_the_course_of_trials_has_the_best_so_far():
    curve = view.search({"search": TRIALS})
    assert curve.table == [(1, 1.5, 1.5), (5, 1.5, 1.75), (7, 1.25, 1.25)]
    assert (curve.chosen, curve.stairs, curve.logarithmic) == (7, True, False)


def test_the_course_of_a_training_has_both_losses():
    curve = view.search({"search": TRAINING})
    assert curve.table == [(0, 20.0, None), (1, None, 1.5), (2, 1.0, 1.25), (3, 1.5, 1.0)]
    assert (curve.chosen, curve.stairs, curve.logarithmic) == (2, False, True)


@pytest.mark.parametrize("course", [None, {}, {"values": {"1": None}, "best_trial": None}])
def test_a_search_without_values_has_no_course(course):
    assert view.search({"search": course}) is None


def test_samples_part_where_the_models_do():
    record = dataclasses.replace(make_run().record, samples=(SampleRecord("p", "one two", "one ten"),))
    assert view.samples(record) == [view.Sample("p", "one t", "wo", "en")]


def test_perplexity_is_read_with_or_without_its_protocol():
    result = {"perplexity": {"a": {"dense": 2.0, "pruned": 3.0, "protocol": {"length": 8}}, "b": {"dense": 2.0}}}
    (row,) = view.perplexities(result)
    assert (row["change"], row["notes"]) == (0.5, {"protocol": {"length": 8}})


def test_zero_shot_takes_the_usual_metric():
    both = {"dense": {"value": 0.5, "stderr": None}, "pruned": {"value": 0.25, "stderr": 0.1}}
    (row,) = view.zero_shot({"zero_shot": {"t": {"metrics": {"acc": {**both}, "acc_norm": {**both}}}, "odd": {}}})
    assert (row["metric"], row["dense"], row["pruned"], row["dense_error"], row["p"]) == (
        "acc_norm",
        50,
        25,
        None,
        None,
    )


def test_recipes_are_compared_key_by_key():
    recipes = [f"budget: {{ratio: {ratio}}}\nmetric: wifv\noutput: {ratio}" for ratio in (0.2, 0.5)]
    assert view.differences(recipes) == [("budget.ratio", ["0.2", "0.5"])]


@pytest.mark.parametrize(
    ("value", "written"),
    [(999, "999"), (3_049_920, "3.05 M"), (260_032, "260 k"), (6_738_415_616, "6.74 B"), (70_000_000_000, "70.0 B")],
)
def test_counts(value, written):
    assert view.count(value) == written


@pytest.mark.parametrize(
    ("value", "written"), [(4.1, "4.10"), (14.829, "14.8"), (372.8, "373"), (1e6, "1e+06"), (float("inf"), "∞")]
)
def test_figures(value, written):
    assert view.figure(value) == written


@pytest.mark.parametrize(
    ("ratio", "written"), [(0.426, "+42.6 %"), (-0.173, f"{view.MINUS}17.3 %"), (9.0, f"{view.TIMES} 10.0")]
)
def test_changes(ratio, written):
    assert view.change(ratio) == written


@pytest.mark.parametrize(
    ("name", "written"),
    [("/data/a/valid.txt, 128 tokens", "valid.txt, 128 tokens"), ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b")],
)
def test_paths_are_shortened(name, written):
    assert view.short(name) == written
