"""Prune as FLAP's released code did, and compare: which units were kept, and the perplexity.

    python tests/benchmarks/fidelity.py ORACLE MODEL

prints the tables of docs/fidelity.md. ORACLE is a folder of the released code's own outputs on MODEL, a LLaMA with
plain multi-head attention:

- ``calibration_tokens.npy``, ``eval_tokens.npy``: whole numbers [windows, tokens].
- ``released_code.json``: ``dense_perplexity`` and ``cases``; a case has ``name``, ``method`` (flap, mag_sp, wanda_sp),
  ``metric`` (IFV, WIFV, WIFN), ``structure`` (UL-UM, UL-MM, AL-MM, AL-AM), ``ratio``, ``remove_heads``, the kept
  ``heads`` and ``neurons`` of every layer, and ``perplexity``.
- ``released_statistics.npz``: ``baseline_inp``, ``fluc_inp`` and ``scaler_inp`` [channels] for ``attn`` and ``mlp`` of
  every layer, as in ``fluc_inp.attn.0``.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import flapkit
from flapkit.evaluation.perplexity import cross_entropy
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import apply_plan_, consumer_of, slice_
from flapkit.pruning.algorithm import Method, find_corrections, find_plan, score_sites
from flapkit.pruning.collector import measure
from flapkit.pruning.moments import Moments
from flapkit.pruning.ranking import raise_attention, standardise
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, Registry

BATCH = 16
BASELINES = {"mag_sp": "magnitude", "wanda_sp": "wanda_sp"}
KINDS = {"attention": "heads", "mlp": "neurons"}


@dataclass(frozen=True)
class Case:
    """One run of the released code, and the components that do the same here."""

    name: str
    method: Method
    ratio: float
    plan: PruningPlan
    perplexity: float

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Case:
        """Read a case of ``released_code.json``."""
        layers = len(entry["heads"])
        keep = {f"layers.{i}.{kind}": tuple(entry[key][i]) for i in range(layers) for kind, key in KINDS.items()}
        return cls(entry["name"], method_of(entry, layers), entry["ratio"], PruningPlan(keep), entry["perplexity"])


def method_of(entry: Mapping[str, Any], layers: int) -> Method:
    """Choose the components of a case. The released code counts heads over all layers, and rounds down where alike."""
    create = Registry.load().create
    if entry["method"] in BASELINES:
        metric = create(METRIC, BASELINES[entry["method"]])
        return Method(metric, create(SEARCHER, "ul_um"), (create(COMPENSATOR, "none"),))
    heads = {"AL-MM": entry["remove_heads"] / layers, "UL-MM": entry["remove_heads"] // layers}.get(entry["structure"])
    searcher = entry["structure"].lower().replace("-", "_")
    return Method(
        create(METRIC, entry["metric"].lower()),
        create(SEARCHER, searcher, {} if heads is None else {"heads": heads}),
        (create(COMPENSATOR, "bias"),),
    )


class Bench:
    """A model, the text, and what flapkit and the released code measure of it."""

    def __init__(self, oracle: Path, model: str) -> None:
        self.dense = flapkit.load(model)
        self.sites = flapkit.sites(self.dense)
        self.calibration = torch.from_numpy(np.load(oracle / "calibration_tokens.npy")).long()
        self.evaluation = torch.from_numpy(np.load(oracle / "eval_tokens.npy")).long()
        self.statistics = measure(self.dense, self.sites, [Moments], batches(self.calibration))
        self.released = read_statistics(oracle / "released_statistics.npz", self.calibration.shape[1])

    def plan(self, case: Case) -> PruningPlan:
        """Find the units to keep, as a recipe does."""
        budget = Budget.over(self.sites, case.ratio)
        return find_plan(self.sites, self.scores(case), case.method.searcher, budget)

    def scores(self, case: Case, statistics: Any = None) -> dict[str, Tensor]:
        """Score the units, from flapkit's statistics or others."""
        return score_sites(self.dense, self.sites, statistics or self.statistics, case.method.metric)

    def perplexity(self, case: Case, plan: PruningPlan) -> float:
        """Carry out a plan on a copy of the model, and measure it."""
        model = copy.deepcopy(self.dense)
        corrections = find_corrections(model, self.sites, self.statistics, case.method.compensators, plan)
        apply_plan_(model, self.sites, plan, corrections)
        return perplexity(model, self.evaluation)

    def as_released(self, case: Case, statistics: Any = None) -> PruningPlan:
        """Find the units to keep with the released code's quirks of searching."""
        if case.method.metric.name == "wanda_sp":
            return self.layer_by_layer(case)
        scores = self.scores(case, statistics)
        if case.method.searcher.name == "al_am":
            return released_al_am(self.sites, scores, case.ratio)
        return find_plan(self.sites, scores, case.method.searcher, Budget.over(self.sites, case.ratio))

    def layer_by_layer(self, case: Case) -> PruningPlan:
        """Measure each layer on what the layers before it give once they are pruned."""
        model, keep = copy.deepcopy(self.dense), {}
        for layer in dict.fromkeys(site.layer for site in self.sites):
            here = [site for site in self.sites if site.layer == layer]
            statistics = measure(model, here, [Moments], batches(self.calibration))
            scores = score_sites(model, here, statistics, case.method.metric)
            plan = find_plan(here, scores, case.method.searcher, Budget.over(here, case.ratio))
            slice_(model, here, plan)
            keep.update(plan.keep)
        return PruningPlan(keep)


def released_al_am(sites: Sequence[Site], scores: Mapping[str, Tensor], ratio: float) -> PruningPlan:
    """Search as the released code does.

    A head's cost in neurons is cut to a whole number; the cost is met as nearly as may be, from either side; the unit
    at the threshold is counted as kept, and goes.
    """
    raised = raise_attention(sites, scores, 2.0)
    values = {site.name: standardise(raised[site.name]).mean(dim=1) for site in sites}
    neuron = next(site.params_per_unit for site in sites if site.kind == "mlp")
    costs = {site.name: torch.full((site.units,), site.params_per_unit // neuron) for site in sites}
    flat, order = torch.cat(list(values.values())).sort(descending=True)
    spent = torch.cat(list(costs.values()))[order].cumsum(0)
    threshold = flat[(spent - spent[-1] * (1 - ratio)).abs().argmin()]
    kept = {name: (value > threshold).nonzero().flatten() for name, value in values.items()}
    return PruningPlan({name: tuple(units.tolist()) for name, units in kept.items()})


def released_fluctuation(windows: Tensor) -> Tensor:
    """Measure [windows, tokens, channels] as the released code does; [channels], in place of a variance.

    Deviations are from the mean so far, squared (its old mean is the new one, under another name), summed over a
    window and averaged over windows; the first window is left out.
    """
    mean, found = torch.zeros(windows.shape[2]), torch.zeros(windows.shape[2])
    for seen, window in enumerate(windows):
        mean = mean * (seen / (seen + 1)) + window.mean(dim=0) / (seen + 1)
        if seen:
            found = found * ((seen - 1) / seen) + (window - mean).square().sum(dim=0) / (seen + 1)
    return found.double() / windows.shape[1]


class ReleasedStatistics(dict[type[Moments], Any]):
    """The released code's figures of one site, in the place of ``SiteStatistics``."""

    def only(self, classes: Sequence[type]) -> ReleasedStatistics:
        """Return the same: they are moments, which every metric compared here declares."""
        return self


def read_statistics(path: Path, tokens: int) -> dict[str, ReleasedStatistics]:
    """Put the released code's statistics in the place of flapkit's; its sums are over a window's tokens."""
    stored = np.load(path)
    found: dict[str, ReleasedStatistics] = {}
    for key in stored:
        part, kind, layer = key.split(".")
        name = f"layers.{layer}.{'attention' if kind == 'attn' else 'mlp'}"
        field = {"fluc_inp": "variance", "scaler_inp": "second_moment"}.get(part)
        moments = found.setdefault(name, ReleasedStatistics({Moments: SimpleNamespace()}))[Moments]
        if field:
            setattr(moments, field, torch.from_numpy(stored[key]).double() / tokens)
    return found


@torch.no_grad()
def inputs_of(model: PreTrainedModel, sites: Sequence[Site], tokens: Tensor) -> dict[str, Tensor]:
    """Collect the consumers' inputs, site name -> [windows, tokens, channels]."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    handles = [
        consumer_of(model, site).register_forward_pre_hook(lambda _, args, into=seen[site.name]: into.append(args[0]))
        for site in sites
    ]
    for batch in batches(tokens):
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def batches(tokens: Tensor) -> Iterator[dict[str, Tensor]]:
    """Split tokens [windows, tokens] into batches."""
    return ({"input_ids": part} for part in tokens.split(BATCH))


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tensor) -> float:
    """Measure exp of the mean over windows of each window's mean cross-entropy: the released code's protocol."""
    means = []
    for batch in batches(tokens):
        nll, targets = cross_entropy(model(**batch, use_cache=False).logits, batch["input_ids"])
        means.append(nll.double() / targets)
    return float(torch.cat(means).mean().exp())


def differing(one: PruningPlan, other: PruningPlan) -> int:
    """Count the units that one plan keeps and the other does not."""
    return sum(len(set(one.keep[name]) ^ set(other.keep[name])) for name in one.keep)


def print_row(*cells: object) -> None:
    """Print a row of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |")


def compare_cases(bench: Bench, cases: Sequence[Case]) -> None:
    """Print the table of cases, and how well a released plan is carried out."""
    total = sum(site.params for site in bench.sites)
    print_row(
        "case", "removed", "ours", "perplexity", "ours", "units that differ", "with its search", "and its statistics"
    )
    print_row(*["---"] * 8)
    carried = []
    for case in cases:
        ours = bench.plan(case)
        removed = [f"{plan.removed_params(bench.sites) / total:.2%}" for plan in (case.plan, ours)]
        perplexities = [f"{case.perplexity:.3f}", f"{bench.perplexity(case, ours):.3f}"]
        plans = (ours, bench.as_released(case), bench.as_released(case, bench.released))
        print_row(case.name, *removed, *perplexities, *(differing(case.plan, plan) for plan in plans))
        carried.append(abs(bench.perplexity(case, case.plan) / case.perplexity - 1))
    print(f"\nOf {sum(site.units for site in bench.sites)} units.")
    print(f"The released plans, carried out by flapkit, have the released perplexities to {max(carried):.0e}.\n")


def compare_statistics(bench: Bench) -> None:
    """Print how far the released statistics are from the exact ones, and from their own formula."""
    inputs = inputs_of(bench.dense, bench.sites, bench.calibration)
    print_row("site", "its variance against the exact one", "rank correlation", "against its formula, done again")
    print_row(*["---"] * 4)
    for site in bench.sites:
        released = bench.released[site.name][Moments].variance
        exact = bench.statistics[site.name][Moments].variance
        off, again = released / exact - 1, (released_fluctuation(inputs[site.name]) / released - 1).abs()
        ranks = torch.stack([values.argsort().argsort().double() for values in (released, exact)])
        correlation = float(torch.corrcoef(ranks)[0, 1])
        print_row(site.name, f"{off.min():+.1%} to {off.max():+.1%}", f"{correlation:.5f}", f"{again.max():.0e}")


def main() -> None:
    """Compare, and print tables in Markdown."""
    oracle, model = Path(sys.argv[1]), sys.argv[2]
    data = json.loads((oracle / "released_code.json").read_text())
    bench = Bench(oracle, model)
    dense = perplexity(bench.dense, bench.evaluation)
    print(f"Dense perplexity: {data['dense_perplexity']:.4f}, ours {dense:.4f}.\n")
    compare_cases(bench, [Case.of(entry) for entry in data["cases"]])
    compare_statistics(bench)


if __name__ == "__main__":
    main()
