"""What the blocks of a model take in time on this machine: a table that ``flapkit bench --blocks`` makes and stores.

A linear model: the time of the whole model falls by the same amount with each unit that goes, in blocks of the same
shape alike. Whole models are timed in turns with the dense one: a block alone would stay in the processor's cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from flapkit.checkpoint.load import DType, load
from flapkit.evaluation.block_table import BlockTimes, Phase, PhaseTimes, shapes_of
from flapkit.evaluation.speed import Seconds, Tick, Workload, draw_prompt, time_in_turns
from flapkit.model.plan import PruningPlan
from flapkit.model.positions import check_lengths
from flapkit.model.precision import name_of
from flapkit.model.site import Site
from flapkit.model.surgery import apply_plan_, copy_sharing_weights
from flapkit.registry import Registry
from flapkit.run.bench import Device, describe_machine, find_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (2 / 3, 1 / 3)
"""Shares of a kind's units that are kept in the models that are timed beside the dense one."""


def time_blocks(
    checkpoint: str,
    workload: Workload,
    *,
    device: Device = "auto",
    dtype: DType = "auto",
    tick: Tick = lambda: None,
) -> BlockTimes:
    """Time a model with fewer units of each kind, in turns with the whole one, and store the table.

    Args:
        checkpoint: a folder, a hub id, or ``builtin:NAME``.
        workload: what to time.
        device: the device; ``auto`` is a GPU if there is one.
        dtype: dtype of the weights.
        tick: called after each turn.

    Raises:
        FlapkitError: the model cannot be loaded or has no adapter, the device is missing, or the context is too short.
    """
    place = find_device(device)
    model = load(checkpoint, dtype)
    nn.Module.to(model, place)
    sites = Registry.load().resolve({"name": "auto", "unit": "kv_group"}, model.config).sites(model.config)
    check_lengths(model, {"bench: prompt and generated tokens": workload.prompt + workload.tokens})
    kinds = list(_kinds(sites).values())
    turns: list[tuple[Mapping[str, float], list[Seconds], list[Seconds]]] = []
    for kept in _variants(kinds):
        plan = _plan(sites, kept)
        dense, pruned = _time_beside(model, sites, plan, workload, tick)
        turns.append(({name: 1 - len(keep) / _units(sites)[name] for name, keep in plan.keep.items()}, dense, pruned))
    phases: dict[Phase, PhaseTimes] = {
        "prefill": _fit(kinds, turns, lambda turn: turn.prefill),
        "decode": _fit(kinds, turns, lambda turn: turn.decode / workload.tokens),
    }
    environment = describe_machine(place, name_of(model.dtype), compiled=False)
    table = BlockTimes(checkpoint, shapes_of(sites), workload.batch_size, workload.prompt, phases, environment)
    table.store()
    return table


def _units(sites: Sequence[Site]) -> dict[str, int]:
    return {site.name: site.units for site in sites}


def _kinds(sites: Sequence[Site]) -> dict[tuple[Any, ...], list[Site]]:
    """Gather the sites whose units take the same time: blocks of the same name and shape."""
    kinds: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        kinds.setdefault((site.block_name, site.units, site.channels_per_unit, site.params_per_unit), []).append(site)
    return kinds


def _variants(kinds: Sequence[Sequence[Site]]) -> Iterator[dict[str, float]]:
    """Yield the models to time: site name -> share of its units to keep; at last one with half of everything."""
    for kind in kinds:
        for share in SHARES:
            yield {site.name: share for site in kind}
    yield {site.name: 0.5 for kind in kinds for site in kind}


def _plan(sites: Sequence[Site], shares: Mapping[str, float]) -> PruningPlan:
    """Keep the first units of each run, as many as a share says, and at least one step."""
    keep = {}
    for site in sites:
        length = site.units_per_run
        count = length if site.name not in shares else max(1, round(shares[site.name] * length / site.step)) * site.step
        count = min(count, length)
        keep[site.name] = tuple(run * length + unit for run in range(site.runs) for unit in range(count))
    return PruningPlan(keep)


def _time_beside(
    model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan, workload: Workload, tick: Tick
) -> tuple[list[Seconds], list[Seconds]]:
    """Time the dense model and a pruned copy in turns."""
    pruned = copy_sharing_weights(model, sites)
    apply_plan_(pruned, sites, plan, {})
    prompt = draw_prompt(model, workload)
    times = time_in_turns({"dense": model, "pruned": pruned}, {"dense": prompt, "pruned": prompt}, workload, tick)
    return times["dense"], times["pruned"]


def _fit(
    kinds: Sequence[Sequence[Site]],
    turns: Sequence[tuple[Mapping[str, float], list[Seconds], list[Seconds]]],
    seconds: Callable[[Seconds], float],
) -> PhaseTimes:
    """Fit how much of the dense model's time goes with the units of each kind; the last turns are the test.

    Args:
        kinds: the sites of each kind.
        turns: of each timed model the removed share of each site, and the turns of the dense and the pruned model.
        seconds: the time of a turn.
    """
    total = statistics.median(seconds(turn) for _, dense, _ in turns for turn in dense)
    # A slow moment of the machine hits both models of a turn.
    saved = [
        (removed, 1 - statistics.median(seconds(b) / seconds(a) for a, b in zip(dense, pruned, strict=True)))
        for removed, dense, pruned in turns
    ]
    *fitted, (half, of_half) = saved
    units, predicted = dict[str, float](), 1.0
    for kind in kinds:
        name = kind[0].name
        points = [(removed[name], gain) for removed, gain in fitted if removed[name]]
        weight = sum(share * share for share, _ in points)
        share = max(0.0, sum(share * gain for share, gain in points) / weight) if weight else 0.0
        units |= {site.name: share * total / sum(other.units for other in kind) for site in kind}
        predicted -= share * half[name]
    return PhaseTimes(total, units, max(0.0, predicted), max(0.0, 1 - of_half))
