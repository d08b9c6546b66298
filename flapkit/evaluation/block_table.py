"""What the blocks of a model take in time on this machine: the table that ``flapkit bench --blocks`` stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter

from flapkit.model.budget import Cost
from flapkit.model.site import Site
from flapkit.system.errors import BudgetError, InputError
from flapkit.system.json_files import first_problem, read_object
from flapkit.system.paths import cache_folder
from flapkit.system.workdir import write_file

Phase = Literal["decode", "prefill"]

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

    def store(self) -> None:
        """Write the table where ``find_times`` finds it; an earlier one is replaced."""
        path = _path(self.shapes, self.batch_size, self.prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.to_json())

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
    path = _path(shapes_of(sites), batch_size, prompt)
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
        raise InputError(f"{path}: {first_problem(error)}; run `flapkit bench --blocks` again") from error


def _path(shapes: str, batch_size: int, prompt: int) -> Path:
    return cache_folder() / "block-times" / f"{shapes}-{batch_size}-{prompt}.json"


def shapes_of(sites: Sequence[Site]) -> str:
    """Identify the shapes of a model's blocks, wherever it is stored."""
    shapes = [(s.name, s.units, s.channels_per_unit, s.out_features, s.params_per_unit, s.runs) for s in sites]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _block_name(site: str) -> str:
    """Return a block's name from that of its site: ``layers.0.mlp`` and ``layers.0.experts.7``."""
    return site.split(".")[2] if site.startswith("layers.") else site
