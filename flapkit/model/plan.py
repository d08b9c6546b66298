"""Plans: which units stay."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from flapkit.model.site import Site, groups
from flapkit.system.errors import InputError, did_you_mean
from flapkit.system.json_files import parse_json
from flapkit.system.sizes import counted


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """The units kept at each site.

    Args:
        keep: site name -> kept units, ascending, as indices into the units of the model that is pruned.
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return the numbers of sites and kept units; ``summary`` lists them by layer."""
        kept = sum(map(len, self.keep.values()))
        return f"PruningPlan({counted(len(self.keep), 'site')}, {counted(kept, 'unit')} kept)"

    def summary(self, sites: Sequence[Site] = ()) -> str:
        """Return a table of the number of units that each layer keeps.

        Args:
            sites: the sites of the model before pruning; if given, the table has the units before, and the parameters
                removed.
        """
        rows = _table(self, sites)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if sites:
            removed, params = self.removed_params(sites), sum(site.params for site in sites)
            lines.append(f"removed: {removed:,} of {params:,} parameters ({removed / params:.1%})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the table of ``summary`` for notebooks."""
        names, *rows = _table(self)
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"

    def only(self, sites: Sequence[Site]) -> PruningPlan:
        """Return the plan of some sites."""
        return PruningPlan({site.name: self.keep[site.name] for site in sites})

    def check(self, sites: Sequence[Site]) -> None:
        """Raise ``InputError`` unless the plan fits the sites: known names, and ascending units within range."""
        known = {site.name: site for site in sites}
        for name, units in self.keep.items():
            if name not in known:
                raise InputError(f"plan: the model has no site {name!r}{did_you_mean(name, known)}")
            if not units and not known[name].removable and not known[name].within:
                raise InputError(f"plan: {name} keeps no unit; keep at least one")
            if known[name].within in known and bool(units) != self._has_expert(known[name]):
                raise InputError(
                    f"plan: {name} keeps {counted(len(units), 'unit')}, and {known[name].within} "
                    f"{'removes' if units else 'keeps'} this expert; an expert keeps units if it stays, and only then"
                )
            if 0 < len(units) < known[name].least:
                raise InputError(
                    f"plan: {name} keeps {counted(len(units), 'expert')}; its router chooses among at least "
                    f"{known[name].least}"
                )
            if units and max(units) >= known[name].units:
                raise InputError(
                    f"plan: {name} keeps unit {max(units)}, but the model has {known[name].units} there, counted from "
                    "0; is it the plan of another model?"
                )
            if list(units) != sorted(set(units)) or not set(units) <= set(range(known[name].units)):
                raise InputError(f"plan: {name}: kept units must be ascending, from 0 to {known[name].units - 1}")
            run = known[name].units // known[name].runs
            if len({sum(unit // run == index for unit in units) for index in range(known[name].runs)}) > 1:
                raise InputError(f"plan: {name}: each run of {run} units must keep the same number of units")
        if missing := sorted(known.keys() - self.keep.keys()):
            raise InputError(f"plan: missing sites: {', '.join(missing)}")
        for together in groups(sites):
            left = [site for site in together if self.keep[site.name] or not site.within]
            if len({len(self.keep[site.name]) for site in left}) > 1:
                raise InputError(f"plan: the experts of {together[0].group} must keep the same number of units")

    def check_left(self, sites: Sequence[Site]) -> None:
        """Raise ``InputError`` if nothing is left of what the model needs one of.

        Args:
            sites: all sites of the model.
        """
        left = {site.one_of for site in sites if self.keep[site.name]}
        if gone := [site.one_of for site in sites if site.one_of and site.one_of not in left]:
            raise InputError(f"plan: it removes every {gone[0]}, and the model needs one; keep units of one of them")

    def emptied(self, sites: Sequence[Site]) -> PruningPlan:
        """Return the plan in which experts that a mixture removes whole keep no units.

        Args:
            sites: the sites of the plan.
        """
        gone = {site.name for site in sites if site.within in self.keep and not self._has_expert(site)}
        return PruningPlan({name: () if name in gone else units for name, units in self.keep.items()})

    def _has_expert(self, site: Site) -> bool:
        """Tell whether an expert's mixture keeps it."""
        return site.expert in self.keep.get(site.within, ())

    def removed_units(self, site: Site) -> list[int]:
        """Return the units of a site that the plan removes, ascending."""
        kept = set(self.keep[site.name])
        return [unit for unit in range(site.units) if unit not in kept]

    def removed_params(self, sites: Iterable[Site]) -> int:
        """Count the parameters that the plan removes."""
        return sum(site.removed_params(len(self.keep[site.name])) for site in sites)

    def to_json(self) -> str:
        """Return the plan as JSON, one line per site."""
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(list(units))}" for name, units in self.keep.items())
        return f'{{\n  "keep": {{\n{lines}\n  }}\n}}\n'

    @classmethod
    def read(cls, path: Path) -> PruningPlan:
        """Read a plan from a file.

        Raises:
            InputError: the file cannot be read, or is not a plan.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan from JSON; the inverse of ``to_json``.

        Raises:
            InputError: the text is not JSON, or not a plan.
        """
        try:
            data: Any = parse_json(text)
        except ValueError as error:
            raise InputError(f"plan: not JSON: {error}") from error
        keep = data.get("keep") if isinstance(data, dict) else None
        if not isinstance(keep, dict) or set(data) != {"keep"}:
            raise InputError('plan: expected an object {"keep": {site: [units]}} and nothing else')
        for name, units in keep.items():
            if not isinstance(units, list) or not all(type(unit) is int for unit in units):
                raise InputError(f"plan: {name}: expected a list of whole numbers")
        return cls({name: tuple(units) for name, units in keep.items()})


def _table(plan: PruningPlan, sites: Sequence[Site] = ()) -> list[list[str]]:
    """Return a row of column names, and a row for each layer; the experts of a layer share a cell.

    Args:
        plan: the plan.
        sites: the sites before pruning; may be empty.
    """
    units = {site.name: site.units for site in sites}
    cells: dict[str, dict[str, list[str]]] = {}
    for name, keep in plan.keep.items():
        matched = re.fullmatch(r"layers\.(\d+)\.([^.]+)(?:\.(\d+))?", name)
        layer, block, expert = matched.groups() if matched else ("", name, None)
        if expert and not keep:
            # It is gone, and counts among those that the mixture removes.
            continue
        before = f" of {units[name]}" if name in units else ""
        cells.setdefault(layer, {}).setdefault(block, []).append(f"{len(keep)}{before}")
    blocks = list(dict.fromkeys(block for row in cells.values() for block in row))
    rows = [[layer, *(_cell(row.get(block, [])) for block in blocks)] for layer, row in cells.items()]
    return [["layer", *blocks], *rows]


def _cell(counts: Sequence[str]) -> str:
    """Write the count of one block, or of all experts of a layer."""
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{len(counts)} x {counts[0]}"
    return ", ".join(counts)
