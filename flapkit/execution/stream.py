"""Run a model one decoder layer at a time: a model in memory, or one that is never whole in memory.

A ``LayerStream`` builds the model on the meta device and loads the weights outside its decoder layers. A layer is
loaded from the checkpoint's safetensors, runs on all windows, and frees its memory before the next.

```python
stream = LayerStream(config, open_weights(path), "model.layers")
hidden = HiddenStates()
for index in walk(stream, hidden):
    step_all(stream, index, batches, hidden)
logits = stream.logits(batches[0], hidden[0])
```
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from flapkit.checkpoint.ties import untie_
from flapkit.checkpoint.weights import Weights, write_tensors
from flapkit.model.site import Site
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.pruning.collector import Batch, Collector
from flapkit.system.errors import ModelError
from flapkit.system.workdir import damaged_as_output_error

Forms = Mapping[str, bool]
"""Name of a layer's class -> whether it returns its hidden states in a tuple."""

_Forward = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Any]


class LayerRunner:
    """Runs the decoder layers of a model one at a time, with the masks and positions that the model computes.

    Args:
        model: the model, in evaluation mode.
        layers: full name of its list of decoder layers.
        device: where the layers run.
        precision: context of every forward pass, such as autocast.
        forms: name of a layer's class -> whether it returns its hidden states in a tuple, as far as known; a class
            becomes known when a layer of it runs.

    Attributes:
        model: the model.
        path: full name of the list of decoder layers.
        layers: the decoder layers; one may be replaced by a copy temporarily.
        device: where the layers run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        device: torch.device | str = "cpu",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        forms: Forms | None = None,
    ) -> None:
        self.model = model
        self.path = layers
        self.layers: Any = model.get_submodule(layers)
        self.device = torch.device(device)
        self.forms: dict[str, bool] = dict(forms or {})
        self._precision = precision

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Hold a layer's weights in memory."""
        yield self.layers[index]

    def embed(self, batch: Batch) -> Tensor:
        """Return the input of the first layer, [windows, tokens, hidden].

        Args:
            batch: ``input_ids`` [windows, tokens], and perhaps ``attention_mask``.
        """

        def stop(current: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise _LayerDone(current)

        return self._run(batch, 0, stop)

    def step(self, index: int, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Run one layer on a batch, with the masks and positions that the model computes.

        Args:
            index: a loaded layer.
            batch: ``input_ids`` [windows, tokens], and perhaps ``attention_mask``.
            hidden: output of the layer before, [windows, tokens, hidden]; None for the first layer.

        Returns:
            The layer's output, [windows, tokens, hidden].
        """

        def run(current: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = self.layers[index](current if hidden is None else hidden.to(current.device), *args, **kwargs)
            self.forms[type(self.layers[index]).__name__] = isinstance(output, tuple)
            raise _LayerDone(output[0] if isinstance(output, tuple) else output)

        return self._run(batch, index, run)

    def _run(self, batch: Batch, index: int, run: _Forward) -> Tensor:
        with self._replaced({index: run}):
            try:
                self.model.base_model(**self._inputs(batch), use_cache=False)
            except _LayerDone as done:
                return done.hidden
        raise ModelError(f"{self.path}.{index}: the model did not run this layer; it cannot be run layer by layer")

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Run the final norm and the head.

        Args:
            batch: as for ``step``.
            hidden: output of the last layer, [windows, tokens, hidden].

        Returns:
            [windows, tokens, vocabulary].
        """
        last = len(self) - 1

        def insert(current: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._as_output(last, hidden.to(current.device))

        with self._replaced({last: insert}):
            logits: Tensor = self.model(**self._inputs(batch), use_cache=False).logits
            return logits

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask") if name in batch}

    @contextmanager
    def _replaced(self, forwards: Mapping[int, _Forward]) -> Iterator[None]:
        """Replace the layers by stand-ins; those without a given forward return their input."""

        def identity(index: int) -> _Forward:
            return lambda current, args, kwargs: self._as_output(index, current)

        stand_ins = [_StandIn(layer, forwards.get(i) or identity(i)) for i, layer in enumerate(self.layers)]
        path, _, name = self.path.rpartition(".")
        owner = self.model.get_submodule(path)
        setattr(owner, name, nn.ModuleList(stand_ins))
        try:
            with torch.no_grad(), self._precision():
                yield
        finally:
            setattr(owner, name, self.layers)

    def _as_output(self, index: int, hidden: Tensor) -> Any:
        """Return hidden states in the form in which the layer returns them."""
        return (hidden,) if self.forms[type(self.layers[index]).__name__] else hidden


class LayerStream(LayerRunner):
    """A model with one decoder layer in memory at a time.

    Args:
        config: the model's configuration.
        weights: its checkpoint.
        layers: full name of the list of decoder layers.
        dtype: dtype of the weights in memory; by default that of the checkpoint.
        device, precision, forms: as for ``LayerRunner``.

    Attributes:
        model: the model; layers that are not loaded are on the meta device.

    Raises:
        ModelError: the checkpoint lacks a tensor of the model.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        weights: Weights,
        layers: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        forms: Forms | None = None,
    ) -> None:
        config = copy.deepcopy(config)
        untie_(config, weights)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.tie_weights()
        super().__init__(model, layers, device, precision, forms)
        self.read_from(weights)
        self._fill(list(self.tensors_of(None)))
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            _put(self.model, name, buffer.to(self.device))

    def read_from(self, weights: Weights) -> None:
        """Load layers from another checkpoint from now on; the weights outside the layers are not loaded again.

        Raises:
            ModelError: the checkpoint lacks a tensor of the model.
        """
        self._weights = weights
        self._conversions: list[Any] = get_model_conversion_mapping(self.model)
        self._sources = self._find_sources()

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Load a layer's weights, and free their memory at the end; sliced weights keep their new shapes."""
        self._fill(list(self.tensors_of(index)))
        layer = self.layers[index]
        try:
            yield layer
        finally:
            for name, parameter in list(layer.named_parameters()):
                _put(layer, name, parameter.detach().to("meta"))

    def tensors_of(self, index: int | None) -> dict[str, Tensor]:
        """Map the full names of a layer's tensors to their values, as a checkpoint holds them.

        Args:
            index: the layer; None for the tensors outside the layers.
        """
        return {name: tensor for name, tensor in self._tensors().items() if self.holds(index, name)}

    def holds(self, index: int | None, name: str) -> bool:
        """Tell whether a tensor belongs to a layer; ``index`` as for ``tensors_of``."""
        start = f"{self.path}." if index is None else f"{self.path}.{index}."
        return name.startswith(start) == (index is not None)

    def _tensors(self) -> dict[str, Tensor]:
        """Map the full names of all tensors to their values; tied ones appear once."""
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied -= {name for name, _ in self.model.named_parameters()}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}

    def _find_sources(self) -> dict[str, list[str]]:
        """Map each tensor of the model to its source tensors in the checkpoint, by transformers' conversions."""
        renamings = [rule for rule in self._conversions if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._conversions if isinstance(rule, WeightConverter)]
        state, sources = self.model.state_dict(), defaultdict(list)
        for key in self._weights:
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            sources[key if key in state and name not in state else name].append(key)
        for name in self._tensors():
            if name not in sources:
                raise ModelError(
                    f"the checkpoint has no tensor for {name}: it is incomplete, or cannot be read layer by layer"
                )
        return sources

    def _fill(self, names: Sequence[str]) -> None:
        """Load some tensors of the model, with transformers' conversions and dtypes."""
        keys = [key for name in names for key in self._sources[name]]
        options = LoadStateDictConfig(
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            device_map={"": self.device},
            weight_mapping=self._conversions,
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, self._weights.read(keys), options)
        for name, shape, expected in info.mismatched_keys:
            raise ModelError(f"{name}: the checkpoint has the shape {list(shape)}, the model {list(expected)}")
        for name, problem in info.conversion_errors.items():
            raise ModelError(f"{name}: cannot be converted from the checkpoint's tensors: {problem}")


class HiddenStates:
    """The hidden states of all batches between two layers: [windows, tokens, hidden], on the CPU.

    On the disk, a layer's input is kept beside its output until ``advance``, so that an interrupted run can resume.

    Args:
        folder: where they are stored, one file per batch; None for memory.
        layers: how many layers the batches of an interrupted run have passed; if the folder lacks the output of the
            last one, the batches start over.

    Attributes:
        layers: how many layers all batches have passed.
    """

    def __init__(self, folder: Path | None = None, layers: int = 0) -> None:
        self._folder = folder
        self._in_memory: dict[int, Tensor] = {}
        self.layers = layers if folder is not None and (folder / str(layers)).is_dir() else 0
        if folder is not None and not self.layers:
            self.clear()

    def __getitem__(self, batch: int) -> Tensor:
        if self._folder is None:
            return self._in_memory[batch]
        path = self._file(self.layers, batch)
        with damaged_as_output_error(path):
            return load_file(path)["hidden"]

    def put(self, batch: int, hidden: Tensor) -> None:
        """Store a layer's output for a batch."""
        if self._folder is None:
            self._in_memory[batch] = hidden.cpu()
        else:
            write_tensors(self._file(self.layers + 1, batch), {"hidden": hidden}, {})

    def advance(self) -> None:
        """Move on: all batches have passed another layer."""
        self._remove(self.layers)
        self.layers += 1

    def clear(self) -> None:
        """Remove all hidden states."""
        self._in_memory.clear()
        self._remove()

    def _remove(self, *layers: int) -> None:
        folder = self._folder.joinpath(*map(str, layers)) if self._folder else None
        if folder is not None and folder.exists():
            shutil.rmtree(folder)

    def _file(self, layers: int, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / str(layers) / f"{batch}.safetensors"


def walk(stream: LayerRunner, hidden: HiddenStates, first: int | None = None) -> Iterator[int]:
    """Load each layer, yield its index, and free its memory before the next.

    Args:
        stream: the model.
        hidden: the hidden states; advanced after each layer.
        first: the first layer, for a walk without batches; by default the next one for the hidden states.
    """
    for index in range(hidden.layers if first is None else first, len(stream)):
        with stream.loaded(index):
            yield index
        hidden.advance()


def step_all(
    stream: LayerRunner,
    index: int,
    batches: Sequence[Batch],
    hidden: HiddenStates,
    collector: Collector | None = None,
    *,
    store: bool = True,
) -> None:
    """Run one loaded layer on every batch, and let a collector measure it.

    Args:
        stream: the model.
        index: a loaded layer.
        batches: as for ``LayerStream.step``.
        hidden: the hidden states before the layer.
        collector: measures the layer.
        store: store the layer's output; if false, the layer runs only to be measured.
    """
    for number, batch in enumerate(batches):
        if collector:
            collector.begin(batch)
        output = stream.step(index, batch, hidden[number] if hidden.layers else None)
        if collector:
            collector.check()
        if store:
            hidden.put(number, output)


class _LayerDone(Exception):  # noqa: N818 - not an error: it ends the forward pass after the layer
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StandIn(nn.Module):
    """Stands in for a layer while the rest of the model runs."""

    def __init__(self, layer: nn.Module, forward: _Forward) -> None:
        super().__init__()
        # Not a submodule: attributes that the model reads, such as the attention type, come from the real layer.
        self.__dict__["_hidden_layer"] = layer
        self._forward = forward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the given function instead of the layer."""
        return self._forward(hidden_states, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_hidden_layer"], name)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or a buffer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def layers_of(sites: Sequence[Site]) -> str:
    """Return the full name of the list of decoder layers that contains some sites.

    Raises:
        ModelError: a site is not in such a list.
    """
    first = sites[0]
    path = first.consumer.partition(f".{first.layer}.")[0]
    for site in sites:
        if not site.consumer.startswith(f"{path}.{site.layer}."):
            raise ModelError(f"{site.consumer} is not in a list of layers {path}; use `execution: whole`")
    return path


@torch.no_grad()
def verify(config: PreTrainedConfig, layers: str) -> Forms:
    """Compare a tiny model that runs layer by layer with the same model run whole.

    Args:
        config: configuration of the model that will run layer by layer.
        layers: full name of its list of decoder layers.

    Returns:
        The form in which its layers return their hidden states.

    Raises:
        ModelError: the two differ, or the model cannot run layer by layer.
    """
    whole = tiny_model(tiny_config(config))
    tokens = torch.randint(whole.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        stream = LayerStream(whole.config, Weights.of(Path(folder).glob("*.safetensors")), layers)
        hidden = HiddenStates()
        for index in walk(stream, hidden):
            step_all(stream, index, [batch], hidden)
    logits, expected = stream.logits(batch, hidden[0]), whole(**batch).logits
    if not torch.allclose(logits, expected, atol=1e-4 * float(expected.abs().max())):
        raise ModelError(
            f"models of type {config.model_type!r} cannot be run layer by layer: the logits of a tiny model differ by "
            f"{float((logits - expected).abs().max()):.1e}; use `execution: whole`"
        )
    return stream.forms
