"""Find plugins, and create components by name.

flapkit's own plugins are loaded through the same entry points (group ``flapkit``) as others; a recipe can add files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

import pluggy
import pydantic

from flapkit import hookspecs
from flapkit.checkpoint.formats import Exporter
from flapkit.model.adapter import ArchitectureAdapter, adapter_class
from flapkit.model.component import Component
from flapkit.model.declaration import Family
from flapkit.model.derive import Auto
from flapkit.model.empty import check_causal
from flapkit.pruning.components import Compensator, ImportanceMetric, StructureSearcher, repairs_nothing
from flapkit.system.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ENTRY_POINT_GROUP = "flapkit"

C_co = TypeVar("C_co", bound=Component, covariant=True)
C = TypeVar("C", bound=Component)


@dataclass(frozen=True, slots=True)
class ComponentKind(Generic[C_co]):
    """A kind of component.

    Args:
        name: its name in recipes and messages.
        interface: the base class of its components.
    """

    name: str
    interface: type[C_co]

    @property
    def hook(self) -> str:
        """Name of the hook that offers such components."""
        return f"flapkit_{self.name}s"


METRIC = ComponentKind("metric", ImportanceMetric)  # type: ignore[type-abstract]
SEARCHER = ComponentKind("searcher", StructureSearcher)  # type: ignore[type-abstract]
COMPENSATOR = ComponentKind("compensator", Compensator)
ADAPTER = ComponentKind("adapter", ArchitectureAdapter)  # type: ignore[type-abstract]
EXPORTER = ComponentKind("exporter", Exporter)  # type: ignore[type-abstract]

KINDS: tuple[ComponentKind[Component], ...] = (METRIC, SEARCHER, COMPENSATOR, ADAPTER, EXPORTER)


Choice: TypeAlias = str | Mapping[str, Any]
"""A component's name, or a mapping of ``name`` and options."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """A component that a plugin offers, and its origin: a distribution and its version, or a file."""

    component: type[Component]
    origin: str


class Registry:
    """The components of the installed plugins and of a recipe's local files.

    Args:
        plugins: pairs of module and origin, in the order of loading.

    Raises:
        PluginError: a module has no hook or a misspelt one, a hook fails, a component does not fit its interface, or
            two components have the same name.
    """

    def __init__(self, plugins: Iterable[tuple[ModuleType, str]]) -> None:
        self._manager = pluggy.PluginManager("flapkit")
        self._manager.add_hookspecs(hookspecs)
        self._offers: dict[str, dict[str, _Offer]] = {kind.name: {} for kind in KINDS}
        for module, origin in plugins:
            self._register(module, origin)

    @classmethod
    def load(cls) -> Registry:
        """Load every installed plugin."""
        return cls(_installed_plugins())

    def add_module(self, path: Path) -> None:
        """Load a local Python file as a plugin.

        Raises:
            PluginError: the file is missing, fails to import, or is not a plugin.
        """
        self._register(_import_file(path), str(path))

    def add_family(self, family: Family, origin: str) -> None:
        """Add the adapter of an architecture's declaration.

        Args:
            family: the declaration.
            origin: its origin.

        Raises:
            PluginError: another adapter has its name.
        """
        self._add(ADAPTER, family, origin)

    def names(self, kind: ComponentKind[C]) -> dict[str, type[C]]:
        """Return the names of a kind of component and their classes, sorted by name."""
        return {name: self.get(kind, name) for name in sorted(self._offers[kind.name])}

    def origin(self, kind: ComponentKind[Component], name: str) -> str:
        """Return the origin of a component: a distribution and its version, or a file."""
        return self._offers[kind.name][name].origin

    def get(self, kind: ComponentKind[C], name: str) -> type[C]:
        """Return a component's class.

        Raises:
            PluginError: no plugin offers the name.
        """
        offers = self._offers[kind.name]
        if name not in offers:
            raise PluginError(f"unknown {kind.name} {name!r}{did_you_mean(name, offers)}")
        # `_add` has checked that the class inherits from the kind's interface.
        return cast("type[C]", offers[name].component)

    def create(self, kind: ComponentKind[C], name: str, options: Mapping[str, Any] | None = None) -> C:
        """Build a component with options from a recipe, which are checked and converted by its fields' types.

        Raises:
            PluginError: no plugin offers the name, or an option is unknown or has a wrong type or value.
        """
        return _checked(kind, self.get(kind, name), options or {})

    def build(self, kind: ComponentKind[C], chosen: C | Choice) -> C:
        """Return a component from a choice.

        Args:
            kind: the kind of component.
            chosen: a component, a name, or a mapping of ``name`` and options.

        Raises:
            PluginError: it is none of these, no plugin offers the name, or an option is wrong.
        """
        if isinstance(chosen, kind.interface):
            if dataclasses.is_dataclass(chosen):
                options = {
                    field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen) if field.init
                }
                # An object may have options that no recipe can hold, such as a tensor: these are its own to check.
                with suppress(pydantic.PydanticUserError, pydantic.PydanticUndefinedAnnotation):
                    _checked(kind, type(chosen), options)
            return chosen
        if isinstance(chosen, str):
            return self.create(kind, chosen)
        options = dict(chosen) if isinstance(chosen, Mapping) else {}
        name = options.pop("name", None)
        if not isinstance(name, str):
            known = ", ".join(self._offers[kind.name])
            raise PluginError(
                f"{kind.name} {chosen!r}: expected a name, a mapping with `name` and options, or a "
                f"{kind.interface.__name__} (known: {known})"
            )
        return self.create(kind, name, options)

    def adapter_for(self, config: PreTrainedConfig) -> ArchitectureAdapter:
        """Find the adapter of a model: the one that declares it, or ``auto``.

        Raises:
            ModelError: the model is not a decoder-only language model.
            PluginError: several adapters declare it, and none is a subclass of all others.
        """
        return self.resolve(None, config)

    def resolve(self, adapter: ArchitectureAdapter | Choice | None, config: PreTrainedConfig) -> ArchitectureAdapter:
        """Resolve the choice of an adapter.

        Args:
            adapter: an adapter, its name, or a mapping of ``name`` and options. None or ``auto`` chooses the one that
                declares the model's type; if there is none, a declaration is derived and verified.
            config: the model's configuration.

        Raises:
            ModelError: the model is not a decoder-only language model.
            PluginError: there is no such adapter, or several declare the model, and none is a subclass of all others.
        """
        chosen = Auto() if adapter is None else self.build(ADAPTER, adapter)
        if not isinstance(chosen, Auto):
            return chosen
        check_causal(config)
        declared = self._declared(config)
        if declared is None:
            return chosen
        units = {"unit": chosen.unit, "expert_unit": chosen.expert_unit}
        options = {name: unit for name, unit in units.items() if unit != getattr(Auto, name)}
        return self.create(ADAPTER, declared, options)

    def _declared(self, config: PreTrainedConfig) -> str | None:
        """Return the name of the adapter that declares a model; of several, the subclass of all others (Vicuna's)."""
        candidates = [adapter for adapter in self.names(ADAPTER).values() if adapter.supports(config)]
        if not candidates:
            return None
        special = [adapter for adapter in candidates if all(issubclass(adapter, other) for other in candidates)]
        if not special:
            names = ", ".join(adapter.name for adapter in candidates)
            raise PluginError(f"several adapters support models of type {config.model_type!r}: {names}; choose one")
        return special[0].name

    def _register(self, module: ModuleType, origin: str) -> None:
        if self._manager.has_plugin(module.__name__):
            raise PluginError(f"plugin {origin} is already loaded; list it once")
        self._manager.register(module)
        try:
            self._check_hooks(module, origin)
        except PluginError:
            self._manager.unregister(module)
            raise
        for kind in KINDS:
            hook = getattr(module, kind.hook, None)
            if hook is not None:
                for component in _call(hook, origin):
                    self._add(kind, component, origin)

    def _check_hooks(self, module: ModuleType, origin: str) -> None:
        hooks = self._manager.get_hookcallers(module)
        if not hooks:
            known = ", ".join(kind.hook for kind in KINDS)
            raise PluginError(f"plugin {origin} has no hook; decorate one with @flapkit.hookimpl: {known}")
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            hook_names = [kind.hook for kind in KINDS]
            misspelt = [hook.name for hook in hooks if hook.name not in hook_names]
            raise PluginError(
                f"plugin {origin} has an unknown hook {misspelt[0]!r}{did_you_mean(misspelt[0], hook_names)}"
            ) from error

    def _add(self, kind: ComponentKind[Component], component: Any, origin: str) -> None:
        if kind == ADAPTER and isinstance(component, Family):
            component = adapter_class(component)
        label = getattr(component, "__qualname__", repr(component))
        if not (isinstance(component, type) and issubclass(component, kind.interface)):
            raise PluginError(f"plugin {origin}: {label} is not a subclass of {kind.interface.__name__}")
        name = getattr(component, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f'plugin {origin}: {label} has no name; add the class attribute `name = "..."`')
        if missing := sorted(getattr(component, "__abstractmethods__", ())):
            raise PluginError(f"plugin {origin}: {kind.name} {name!r} does not define {', '.join(missing)}")
        if issubclass(component, Compensator) and repairs_nothing(component):
            raise PluginError(f"plugin {origin}: compensator {name!r} defines neither correct nor recovery")
        if "__dataclass_params__" not in vars(component) or not vars(component)["__dataclass_params__"].frozen:
            raise PluginError(
                f"plugin {origin}: {kind.name} {name!r} must be a frozen dataclass: @dataclass(frozen=True)"
            )
        offers = self._offers[kind.name]
        if name in offers:
            other = offers[name].component
            raise PluginError(
                f"two plugins offer a {kind.name} named {name!r}: {other.__module__}.{other.__qualname__} of "
                f"{offers[name].origin} and {component.__module__}.{label} of {origin}; rename or uninstall one"
            )
        offers[name] = _Offer(component, origin)


def _installed_plugins() -> list[tuple[ModuleType, str]]:
    plugins, origins = [], dict[Any, str]()
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.value, entry.name)):
        distribution = entry_point.dist
        if distribution is not None and distribution not in origins:
            # Once: each look at a name or a version reads all metadata.
            metadata = distribution.metadata
            origins[distribution] = f"{metadata['Name']} {metadata['Version']}"
        origin = origins.get(distribution, entry_point.value)
        try:
            module = entry_point.load()
        except Exception as error:
            raise PluginError(
                f"plugin {entry_point.name!r} of {origin} fails to import: {type(error).__name__}: {error}"
            ) from error
        plugins.append((module, origin))
    return plugins


def _import_file(path: Path) -> ModuleType:
    """Import a local plugin file under a unique name, which is in ``sys.modules`` before the file executes."""
    path = path.resolve()
    if not path.is_file():
        raise PluginError(f"plugin {path}: file not found")
    name = f"flapkit_local_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"plugin {path} fails to import: {type(error).__name__}: {error}") from error
    return module


def _call(hook: Any, origin: str) -> list[Any]:
    try:
        return list(hook())
    except Exception as error:
        raise PluginError(
            f"plugin {origin}: hook {hook.__name__} failed: {type(error).__name__}: {error}; "
            "it must return an iterable of classes"
        ) from error


def _checked(kind: ComponentKind[C], component: type[C], options: Mapping[str, Any]) -> C:
    """Build a component with options that its fields' types check and convert.

    Raises:
        PluginError: an option is unknown or has a wrong type or value.
    """
    try:
        return pydantic.TypeAdapter(component).validate_python(dict(options))
    except pydantic.ValidationError as error:
        known = [field.name for field in dataclasses.fields(cast("Any", component))]
        problems = "; ".join(_describe(problem, known) for problem in error.errors())
        raise PluginError(f"{kind.name} {component.name!r}: {problems}") from error


def _describe(problem: Any, known: Sequence[str]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown option {where!r}{did_you_mean(where, known)}"
    return f"option {where!r}: {problem['msg']}"
