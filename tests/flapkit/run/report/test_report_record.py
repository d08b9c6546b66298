"""What a run notes: every unit counted once, thresholds where they are, and the same again from JSON."""

from __future__ import annotations

import json

import pytest
import torch
from runs import make_run, make_scores, make_sites

from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.run.report.report_record import ReportRecord, make_record
from flapkit.system.errors import InputError


def record_of(scores, keep, sites=None):
    sites = sites or make_sites(1)
    return make_record("tiny", sites, scores, PruningPlan(keep), Budget.over(sites, 0.1))


def test_json_round_trip():
    record = make_run().record
    assert ReportRecord.from_json(record.to_json()) == record


def test_every_unit_is_in_one_bin():
    for site in make_run(ratio=0.5).record.sites:
        assert sum(site.scores.kept) == site.kept
        assert sum(site.scores.kept) + sum(site.scores.removed) == site.units


def test_the_threshold_lies_between_the_removed_and_the_kept():
    sites = make_sites(1)
    attention = torch.tensor([[1.0], [2.0], [4.0], [8.0]]).expand(4, 8)
    scores = {**make_scores(sites), "layers.0.attention": attention}
    mlp = tuple(range(48))
    lowest_went = record_of(scores, {"layers.0.attention": (1, 2, 3), "layers.0.mlp": mlp}, sites).sites[0]
    assert 1.0 < lowest_went.scores.threshold < 2.0
    another_went = record_of(scores, {"layers.0.attention": (0, 2, 3), "layers.0.mlp": mlp}, sites).sites[0]
    assert another_went.scores.threshold is None


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        (torch.logspace(-6, 2, 48), "log"),
        (torch.linspace(1, 2, 48), "linear"),
        (torch.linspace(-5, 5, 48), "linear"),
        (torch.zeros(48), "linear"),
        (torch.cat([torch.zeros(10), torch.logspace(-3, 3, 38)]), "log"),
    ],
)
def test_axes_suit_the_scores(scores, scale):
    sites = [site for site in make_sites(1) if site.kind == "mlp"]
    record = record_of({"layers.0.mlp": scores[:, None]}, {"layers.0.mlp": tuple(range(10, 48))}, sites)
    axis = record.axes["mlp"]
    assert axis.scale == scale
    assert list(axis.edges) == sorted(set(axis.edges))
    assert sum(record.sites[0].scores.kept) == 38


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("sites"), "report.json: sites: Field required"),
        (lambda data: data["sites"][0].update(kept="four"), "sites.0.kept"),
        (lambda data: data.update(format=2), "format"),
    ],
)
def test_a_damaged_record_says_where(change, message):
    data = json.loads(make_run().record.to_json())
    change(data)
    with pytest.raises(InputError, match=message):
        ReportRecord.from_json(json.dumps(data))
