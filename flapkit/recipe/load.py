"""Load a recipe: read it, override it, check it and build its components; all problems are reported together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flapkit.checkpoint.formats import Exporter
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.component import Component
from flapkit.pruning.algorithm import Method
from flapkit.pruning.components import (
    Compensator,
    ImportanceMetric,
    StructureSearcher,
    TrainedSearcher,
    corrector_of,
    recovery_of,
)
from flapkit.recipe.files import read
from flapkit.recipe.nodes import Node, Position, Problem, parse
from flapkit.recipe.overrides import override, override_position
from flapkit.recipe.plugin_files import add_file
from flapkit.recipe.schema import KEYS, SEVERAL, ComponentSpec, Recipe
from flapkit.recipe.validation import adapter_of, check
from flapkit.registry import KINDS, ComponentKind, Registry
from flapkit.system.errors import InputError, PluginError, RecipeError, closest
from flapkit.system.paths import to_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A valid recipe and its components.

    Args:
        recipe: the resolved recipe: every option of its components is set, plugin files are absolute paths.
        path: the recipe's file.
        registry: the installed components, and those of the recipe's own plugin files.
        metric: the importance metric.
        searcher: the structure searcher.
        compensators: the compensators; at most one corrects, and at most one recovers.
        adapter: the architecture adapter, or None to choose it by the model's configuration.
        exporters: the exporters.
    """

    recipe: Recipe
    path: Path
    registry: Registry
    metric: ImportanceMetric
    searcher: StructureSearcher
    compensators: tuple[Compensator, ...]
    adapter: ArchitectureAdapter | None
    exporters: tuple[Exporter, ...]

    @property
    def method(self) -> Method:
        """The components that prune."""
        return Method(self.metric, self.searcher, self.compensators)

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.recipe.output).expanduser()

    @property
    def named_compensators(self) -> list[tuple[Compensator, ComponentSpec]]:
        """Each compensator, with its name and options in the recipe."""
        return list(zip(self.compensators, self.recipe.compensator, strict=True))

    def with_compensators(self, named: Sequence[tuple[Compensator, ComponentSpec]]) -> LoadedRecipe:
        """Return the recipe with other compensators, as ``named_compensators`` lists them."""
        recipe = self.recipe.model_copy(update={"compensator": tuple(spec for _, spec in named)})
        return replace(self, recipe=recipe, compensators=tuple(component for component, _ in named))

    def of_model(self, path: str, revision: str | None = None) -> LoadedRecipe:
        """Return the recipe for another model: a checkpoint, or a hub id."""
        model = self.recipe.model.model_copy(update={"path": path, "file": None, "revision": revision})
        return replace(self, recipe=self.recipe.model_copy(update={"model": model}))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe from a file.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings, which replace values of the file, in this order.

    Raises:
        RecipeError: all problems of the recipe, one a line.
        PluginError: an installed plugin cannot be loaded.
    """
    path = Path(path)
    root, problems = read_tree(path, overrides)
    registry, plugin_problems = load_plugins(root)
    loaded = build_recipe(root, path, registry, complete=not plugin_problems)
    if problems or plugin_problems or isinstance(loaded, list):
        reported = {(problem.position, problem.key) for problem in problems}
        further = [*plugin_problems, *(loaded if isinstance(loaded, list) else [])]
        problems += [problem for problem in further if (problem.position, problem.key) not in reported]
        raise _error(problems, overrides)
    return loaded


def build_recipe(root: Node, path: Path, registry: Registry, *, complete: bool = True) -> LoadedRecipe | list[Problem]:
    """Check a recipe's tree and build its components.

    Args:
        root: the recipe.
        path: its file.
        registry: the known components.
        complete: false if a plugin file failed to load: an unknown name may belong to that plugin.

    Returns:
        The recipe, or its problems; the list may be empty if a plugin file failed.
    """
    components, problems = _components(root, registry, complete=complete)
    problems += _combination(root, components["compensator"])
    recipe = check(root, Recipe)
    if isinstance(recipe, Recipe):
        problems += _device_map(root, recipe, components["compensator"], components["searcher"])
    if problems or not complete or isinstance(recipe, list):
        return [*problems, *(recipe if isinstance(recipe, list) else [])]
    several = {kind: tuple(components.pop(kind)) for kind in SEVERAL}
    single = {kind: built[0] for kind, built in components.items() if built}
    specs: dict[str, Any] = {kind: _spec(component) for kind, component in single.items()}
    specs |= {KEYS[kind]: tuple(_spec(component) for component in built) for kind, built in several.items()}
    plugins = tuple(str(to_path(str(entry.value), entry.folder).resolve()) for entry in _plugins(root))
    resolved = recipe.model_copy(update={**specs, "plugins": plugins})
    return LoadedRecipe(
        resolved,
        path,
        registry,
        compensators=several["compensator"],
        exporters=several["exporter"],
        **{"adapter": None, **single},
    )


def read_tree(path: Path, overrides: Sequence[str] = ()) -> tuple[Node, list[Problem]]:
    """Read a recipe's file and apply the overrides.

    Raises:
        RecipeError: the file holds no section of keys.
    """
    source = str(path)
    root, problems = parse(read(path), lambda line, column: Position(source, line, column))
    if root is None and problems:
        raise _error(problems, overrides)
    start = Position(source, 1, 1)
    if root is None or root.value is None:
        raise RecipeError(f"{start}: the recipe is empty; it needs model, calibration, budget and output")
    if not isinstance(root.value, dict):
        raise RecipeError(f"{root.position}: a recipe is a section of keys, such as `output: runs/mine`")
    names = component_names()
    for text in overrides:
        problems += override(root, text, names)
    return root, problems


def component_names() -> dict[str, str | None]:
    """Map each key whose section can be written as a plain name to its default name."""
    return {key: next(iter(_default_names(kind)), None) for kind, key in KEYS.items()}


def _error(problems: Sequence[Problem], overrides: Sequence[str]) -> RecipeError:
    """Sort problems by their position in the file; those of the command line come last, in its order."""
    sources = {str(override_position(text)): index for index, text in enumerate(overrides, start=1)}

    def place(problem: Problem) -> tuple[int, int, int]:
        position = problem.position
        return sources.get(position.source, 0), position.line, position.column

    return RecipeError(*dict.fromkeys(str(problem) for problem in sorted(problems, key=place)))


def load_plugins(root: Node) -> tuple[Registry, list[Problem]]:
    """Load the installed plugins and the recipe's own files."""
    registry = Registry.load()
    problems = []
    for index, entry in enumerate(_plugins(root)):
        if isinstance(entry.value, str):
            try:
                add_file(registry, to_path(entry.value, entry.folder).resolve())
            except InputError as error:
                log.debug("", exc_info=error)
                problems.append(Problem(entry.position, f"plugins.{index}", str(error)))
    return registry, problems


def _plugins(root: Node) -> list[Node]:
    plugins = root.child("plugins")
    return plugins.value if plugins is not None and isinstance(plugins.value, list) else []


def _components(root: Node, registry: Registry, *, complete: bool) -> tuple[dict[str, list[Any]], list[Problem]]:
    """Build the components that the recipe names.

    Args:
        root: the recipe.
        registry: the known components.
        complete: false if a plugin file failed to load: an unknown name may belong to that plugin.

    Returns:
        Name of a kind -> its valid components; and the problems of the others.
    """
    components: dict[str, list[Any]] = {kind.name: [] for kind in KINDS}
    problems: list[Problem] = []
    for kind in KINDS:
        for key, node in _named(root, kind.name):
            built = _component(kind, key, node, registry, complete=complete)
            if isinstance(built, list):
                problems += built
            else:
                components[kind.name].append(built)
    return components, problems


def _named(root: Node, kind: str) -> list[tuple[str, Node]]:
    """List a recipe's components of a kind, with their dotted keys; the default if the recipe names none."""
    key = KEYS[kind]
    node = root.child(key)
    if node is None:
        return [(key, Node(name, root.position, root.position)) for name in _default_names(kind)]
    if kind in SEVERAL and isinstance(node.value, list):
        return [(f"{key}.{index}", entry) for index, entry in enumerate(node.value)]
    return [(key, node)]


def _component(
    kind: ComponentKind[Component], key: str, node: Node, registry: Registry, *, complete: bool
) -> Component | list[Problem]:
    """Build one component, or list its problems; the list is empty where the schema reports them."""
    name = node.child("name") if isinstance(node.value, dict) else node
    if name is None or not isinstance(name.value, str):
        return []
    try:
        component = registry.get(kind, name.value)
    except PluginError as error:
        known = complete or closest(name.value, registry.names(kind))
        return [Problem(name.position, key, str(error))] if known else []
    return check(_options(node), component, key)


def _combination(root: Node, compensators: Sequence[Compensator]) -> list[Problem]:
    """List the problems of a combination of valid compensators."""
    node = root.child("compensator") or root
    try:
        corrector_of(compensators)
        recovery_of(compensators)
    except RecipeError as error:
        return [Problem(node.position, "compensator", str(error))]
    return []


def _device_map(
    root: Node, recipe: Recipe, compensators: Sequence[Compensator], searchers: Sequence[StructureSearcher]
) -> list[Problem]:
    """List what a model that is spread over several devices, in one process, cannot be combined with."""
    trainer, model = recipe.trainer, root.child("model")
    node = model.child("device_map") if model is not None else None
    if recipe.model.device_map is None or node is None:
        return []
    refused = {
        "execution: layerwise: it has one layer in memory at a time; leave one of the two out": (
            recipe.execution.mode == "layerwise"
        ),
        "trainer.strategy: model_parallel: it shards the weights over processes; leave one of the two out": (
            trainer.strategy == "model_parallel"
        ),
        "several processes: one uses all devices; set trainer.devices and trainer.num_nodes to 1": (
            trainer.strategy != "model_parallel" and (trainer.devices != 1 or trainer.num_nodes != 1)
        ),
        f"trainer.precision: {trainer.precision}: set model.dtype instead": trainer.converts_weights,
        "a compensator that trains: leave it out, and call `flapkit recover` afterwards, without device_map": (
            any(compensator.recovery() is not None for compensator in compensators)
        ),
        "a searcher that trains, which needs the model on one device; choose another": (
            any(isinstance(searcher, TrainedSearcher) for searcher in searchers)
        ),
    }
    return [
        Problem(node.position, "model.device_map", f"does not go with {reason}")
        for reason, is_refused in refused.items()
        if is_refused
    ]


def _options(node: Node) -> Node:
    entries = node.value if isinstance(node.value, dict) else {}
    options: dict[str, Node] = {key: entry for key, entry in entries.items() if key != "name"}
    return Node(options, node.position, node.key_position)


def _default_names(kind: str) -> list[str]:
    default = Recipe.model_fields[KEYS[kind]].default
    specs = default if kind in SEVERAL else [default]
    return [spec.name for spec in specs if spec is not None]


def _spec(component: Component) -> ComponentSpec:
    """Return a component's name with all its options."""
    options: Mapping[str, Any] = adapter_of(type(component)).dump_python(component, mode="json")
    return ComponentSpec(name=component.name, **options)
