"""What the blocks of a model take in time on this machine: a table that ``flapkit bench --blocks`` makes and stores.

A linear model: the time of the whole model falls by the same amount with each unit that goes, in blocks of the same
shape alike. Whole models are timed in turns with the dense one: a block alone would stay in the processor's cache.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter
from torch import nn

from flapkit.checkpoint.load import DType, load
from flapkit.evaluation.speed import Seconds, Tick, Workload, draw_prompt, time_in_turns
from flapkit.model.budget import Cost
from flapkit.model.plan import PruningPlan
from flapkit.model.positions import check_lengths
from flapkit.model.precision import name_of
from flapkit.model.site import Site
from flapkit.model.surgery import apply_plan_, copy_sharing_weights
from flapkit.registry import Registry
from flapkit.run.bench import Device, describe_machine, find_device
from flapkit.system.errors import BudgetError, InputError
from flapkit.system.json_files import read_object
from flapkit.system.paths import cache_folder
from flapkit.system.workdir import write_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Phase = Literal["decode", "prefill"]

SHARES = (2 / 3, 1 / 3)
"""Shares of a kind's units that are kept in the models that are timed beside the dense one."""


PICO = 10**12
"""Picoseconds in a second: costs are whole numbers, and a neuron takes nanoseconds on a fast machine."""

_Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """The times of one phase: of a prompt's prefill, or of the decoding of one token.

    Args:
        total: seconds of the dense model.
        units: site name -> seconds by which one unit less shortens it.
        predicted: time of a model with half of all units, over the dense model's, by these numbers.
        measured: the same ratio, as measured.
    """

    total: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    units: Mapping[str, _Time]
    predicted: _Time
    measured: _Time


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """A table of block timings.

    Args:
        checkpoint: the model that was timed.
        shapes: identifies the shapes of its blocks.
        batch_size: prompts per batch.
        prompt: tokens per prompt.
        phases: the times.
        environment: device, threads, dtype, versions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    checkpoint: str
    shapes: str
    batch_size: int
    prompt: int
    phases: Mapping[Phase, PhaseTimes]
    environment: Mapping[str, Any]

    def to_json(self) -> str:
        """Convert the table to JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def named(self) -> dict[str, str]:
        """Return a site of each kind by the name of its block: the sites of a kind have the same time per unit."""
        return {_block_name(site): site for site in reversed(list(self.phases["decode"].units))}

    def cost(self, phase: Phase) -> Cost:
        """Return what the model and its units cost in time, in picoseconds."""
        times = self.phases[phase]
        units = {name: round(PICO * seconds) for name, seconds in times.units.items()}
        detail = f"{phase}, batch {self.batch_size}, prompt {self.prompt}, {self.environment['dtype']}"
        return Cost("latency", round(PICO * times.total), units, detail=detail)


_TABLE: TypeAdapter[BlockTimes] = TypeAdapter(BlockTimes)


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
    table = BlockTimes(checkpoint, _shapes(sites), workload.batch_size, workload.prompt, phases, environment)
    path = _path(table.shapes, table.batch_size, table.prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, table.to_json())
    return table


def find_times(sites: Sequence[Site], model: str, batch_size: int, prompt: int) -> BlockTimes:
    """Find the table of a model's block timings.

    Args:
        sites: the model's sites.
        model: the model's path, for the message.
        batch_size: prompts per batch.
        prompt: tokens per prompt.

    Raises:
        BudgetError: there is none.
        InputError: its file is damaged.
    """
    path = _path(_shapes(sites), batch_size, prompt)
    if not path.is_file():
        options = f" --batch-size {batch_size}" * (batch_size != 1) + f" --prompt {prompt}" * (prompt != 512)
        raise BudgetError(
            f"budget.latency: this model's blocks have not been timed on this machine, for batches of {batch_size} and "
            f"prompts of {prompt} tokens; run `flapkit bench {model} --blocks{options}` first"
        )
    content = read_object(path)
    try:
        return _TABLE.validate_json(json.dumps(content), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}: {first['msg']}; run `flapkit bench --blocks` again") from error


def _path(shapes: str, batch_size: int, prompt: int) -> Path:
    return cache_folder() / "block-times" / f"{shapes}-{batch_size}-{prompt}.json"


def _shapes(sites: Sequence[Site]) -> str:
    """Identify the shapes of a model's blocks, wherever it is stored."""
    shapes = [(s.name, s.units, s.channels_per_unit, s.out_features, s.params_per_unit, s.runs) for s in sites]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _block_name(site: str) -> str:
    """Return a block's name from that of its site: ``layers.0.mlp`` and ``layers.0.experts.7``."""
    return site.split(".")[2] if site.startswith("layers.") else site


def _units(sites: Sequence[Site]) -> dict[str, int]:
    return {site.name: site.units for site in sites}


def _kinds(sites: Sequence[Site]) -> dict[tuple[Any, ...], list[Site]]:
    """Gather the sites whose units take the same time: blocks of the same name and shape."""
    kinds: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        name = site.block.name if site.block else site.kind
        kinds.setdefault((name, site.units, site.channels_per_unit, site.params_per_unit), []).append(site)
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
