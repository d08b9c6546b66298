"""Find plugins and resolve the names of components.

Defaults load through the same entry points (group ``flapkit``) as anyone's; a recipe can add local files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pydantic
from transformers import PreTrainedConfig

from flapkit import hookspecs
from flapkit.checkpoint.exporter import Exporter
from flapkit.model.adapter import ArchitectureAdapter, adapter_class
from flapkit.model.component import Component
from flapkit.model.declaration import Family
from flapkit.model.derive import Auto
from flapkit.model.empty import check_causal
from flapkit.pruning.components import Compensator, ImportanceMetric, StructureSearcher, repairs_nothing
from flapkit.system.errors import PluginError, did_you_mean

ENTRY_POINT_GROUP = "flapkit"


class Registry:
    """The components that the installed plugins, and a recipe's local files, offer.

    Args:
        plugins: (module, where it comes from) pairs, in the order of loading.

    Raises:
        PluginError: a module without hooks, a misspelt hook, a hook that fails, a component that breaks its
            interface's form, or two components of one name.
    """

    def __init__(self, plugins: Iterable[tuple[ModuleType, str]]) -> None:
        self._manager = pluggy.PluginManager("flapkit")
        self._manager.add_hookspecs(hookspecs)
        self._found: dict[str, dict[str, tuple[type[Any], str]]] = {kind: {} for kind in COMPONENT_KINDS}
        for module, origin in plugins:
            self._register(module, origin)

    @classmethod
    def load(cls, files: Sequence[Path] = ()) -> Registry:
        """Load every installed plugin, then a recipe's local files.

        Args:
            files: Python files, each loaded as a plugin, and YAML files, each an architecture's declaration.
        """
        registry = cls(_installed_plugins())
        for path in files:
            registry.add_file(path)
        return registry

    def add_file(self, path: Path) -> None:
        """Load a local file as one more plugin: Python, or an architecture's declaration as YAML.

        Raises:
            PluginError: the file is missing, fails to import, or is no plugin.
        """
        if path.suffix in (".yaml", ".yml"):
            # flapkit.recipe imports this module.
            from flapkit.recipe.declaration import load_family

            self._add("adapter", ArchitectureAdapter, load_family(path), str(path))
        else:
            self._register(_import_file(path), str(path))

    def names(self, kind: str) -> dict[str, type[Any]]:
        """Map the names of a kind of component to their classes, sorted by name."""
        return {name: component for name, (component, _) in sorted(self._found[kind].items())}

    def origin(self, kind: str, name: str) -> str:
        """Say where a component comes from: a distribution and its version, or a file."""
        return self._found[kind][name][1]

    def get(self, kind: str, name: str) -> type[Any]:
        """Return a component's class.

        Raises:
            PluginError: no plugin offers the name.
        """
        if name not in self._found[kind]:
            raise PluginError(f"unknown {kind} {name!r}{did_you_mean(name, self._found[kind])}")
        return self._found[kind][name][0]

    def create(self, kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """Build a component with options from a recipe, which are checked and converted as its fields say.

        Raises:
            PluginError: no plugin offers the name, or an option is unknown or of a wrong type or value.
        """
        component = self.get(kind, name)
        try:
            return pydantic.TypeAdapter(component).validate_python(dict(options or {}))
        except pydantic.ValidationError as error:
            known = [field.name for field in dataclasses.fields(component)]
            problems = "; ".join(_describe(problem, known) for problem in error.errors())
            raise PluginError(f"{kind} {name!r}: {problems}") from error

    def adapter_for(self, config: PreTrainedConfig) -> ArchitectureAdapter:
        """Find the adapter of a model: the one that declares it, or ``auto``.

        Raises:
            ModelError: the model is no decoder-only language model.
            PluginError: several adapters declare it, and none specialises the others.
        """
        return self.resolve(None, config)

    def resolve(self, adapter: ArchitectureAdapter | str | None, config: PreTrainedConfig) -> ArchitectureAdapter:
        """Find the adapter that is meant.

        Args:
            adapter: an adapter or its name; None or ``auto`` stands for the one that declares the model's type, and
                where none does for a declaration that is derived and verified.
            config: the model's configuration.

        Raises:
            ModelError: the model is no decoder-only language model.
            PluginError: no such adapter, or several declare the model, and none specialises the others.
        """
        found: ArchitectureAdapter = self.create("adapter", adapter) if isinstance(adapter, str) else adapter or Auto()
        if not isinstance(found, Auto):
            return found
        check_causal(config)
        declared = self._declared(config)
        if declared is None:
            return found
        options = {} if found == Auto() else {"unit": found.unit}
        chosen: ArchitectureAdapter = self.create("adapter", declared, options)
        return chosen

    def _declared(self, config: PreTrainedConfig) -> str | None:
        """Name the adapter that declares a model; of several, the one that specialises all others, as Vicuna LLaMA."""
        found = [adapter for adapter in self.names("adapter").values() if adapter.supports(config)]
        if not found:
            return None
        special = [adapter for adapter in found if all(issubclass(adapter, other) for other in found)]
        if not special:
            names = ", ".join(adapter.name for adapter in found)
            raise PluginError(f"several adapters support models of type {config.model_type!r}: {names}; name one")
        name: str = special[0].name
        return name

    def _register(self, module: ModuleType, origin: str) -> None:
        if self._manager.has_plugin(module.__name__):
            raise PluginError(f"plugin {origin} is loaded already; name it once")
        self._manager.register(module)
        try:
            self._check_hooks(module, origin)
        except PluginError:
            self._manager.unregister(module)
            raise
        for kind, interface in COMPONENT_KINDS.items():
            hook = getattr(module, f"flapkit_{kind}s", None)
            if hook is not None:
                for component in _call(hook, origin):
                    self._add(kind, interface, component, origin)

    def _check_hooks(self, module: ModuleType, origin: str) -> None:
        hooks = self._manager.get_hookcallers(module)
        if not hooks:
            known = [name for name in vars(hookspecs) if name.startswith("flapkit_")]
            raise PluginError(f"plugin {origin} has no hook; decorate one with @flapkit.hookimpl: {', '.join(known)}")
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            known = [name for name in vars(hookspecs) if name.startswith("flapkit_")]
            misspelt = [hook.name for hook in hooks if hook.name not in known]
            raise PluginError(
                f"plugin {origin} has an unknown hook {misspelt[0]!r}{did_you_mean(misspelt[0], known)}"
            ) from error

    def _add(self, kind: str, interface: type[Any], component: Any, origin: str) -> None:
        if kind == "adapter" and isinstance(component, Family):
            component = adapter_class(component)
        label = getattr(component, "__qualname__", repr(component))
        if not (isinstance(component, type) and issubclass(component, interface)):
            raise PluginError(f"plugin {origin}: {label} is not a subclass of {interface.__name__}")
        name = getattr(component, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f'plugin {origin}: {label} has no name; add the class attribute `name = "..."`')
        if missing := sorted(getattr(component, "__abstractmethods__", ())):
            raise PluginError(f"plugin {origin}: {kind} {name!r} does not define {', '.join(missing)}")
        if kind == "compensator" and repairs_nothing(component):
            raise PluginError(f"plugin {origin}: compensator {name!r} defines neither correct nor recovery")
        if "__dataclass_params__" not in vars(component) or not vars(component)["__dataclass_params__"].frozen:
            raise PluginError(f"plugin {origin}: {kind} {name!r} must be a frozen dataclass: @dataclass(frozen=True)")
        if name in self._found[kind]:
            other, other_origin = self._found[kind][name]
            raise PluginError(
                f"two plugins offer a {kind} named {name!r}: {other.__module__}.{other.__qualname__} of {other_origin}"
                f" and {component.__module__}.{label} of {origin}; rename or uninstall one"
            )
        self._found[kind][name] = (component, origin)


def _installed_plugins() -> list[tuple[ModuleType, str]]:
    plugins = []
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.value, entry.name)):
        distribution = entry_point.dist
        origin = f"{distribution.name} {distribution.version}" if distribution else entry_point.value
        try:
            module = entry_point.load()
        except Exception as error:
            raise PluginError(
                f"plugin {entry_point.name!r} of {origin} fails to import: {type(error).__name__}: {error}"
            ) from error
        plugins.append((module, origin))
    return plugins


def _import_file(path: Path) -> ModuleType:
    """Import a local plugin file under a name of its own, which ``sys.modules`` knows before the file executes."""
    path = path.resolve()
    if not path.is_file():
        raise PluginError(f"plugin {path}: there is no such file")
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


def _describe(problem: Any, known: Sequence[str]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown option {where!r}{did_you_mean(where, known)}"
    return f"option {where!r}: {problem['msg']}"


def options_schema(component: type[Component]) -> dict[str, Any]:
    """Return the JSON schema of a component's options."""
    return pydantic.TypeAdapter(component).json_schema()


COMPONENT_KINDS: Mapping[str, type[Any]] = {
    "metric": ImportanceMetric,
    "searcher": StructureSearcher,
    "compensator": Compensator,
    "adapter": ArchitectureAdapter,
    "exporter": Exporter,
}
"""The kind of a component, as messages call it -> its interface."""
