"""Run a model one decoder layer at a time: a model in memory, or one that is never whole in memory.

A ``LayerStream`` builds the model without memory; what stands outside its decoder layers is loaded and stays. Each
layer is loaded from the checkpoint's safetensors, runs on all windows, and frees its memory before the next.

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
"""Name of the class of a layer -> whether it gives its hidden states in a tuple."""

_Answer = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Any]


class LayerRunner:
    """Runs the decoder layers of a model one at a time, each with the masks and positions that the model gives it.

    Args:
        model: the model, in evaluation mode.
        layers: full name of its list of decoder layers.
        device: where the layers run.
        precision: context of every forward pass, such as autocast.
        forms: name of the class of a layer -> whether it returns its hidden states in a tuple, as far as that is known
            already; a class is known once a layer of it has run.

    Attributes:
        model: the model.
        path: full name of the list of decoder layers.
        layers: the decoder layers; one may be replaced by a copy for a while.
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
        """Have a layer's weights in memory."""
        yield self.layers[index]

    def embed(self, batch: Batch) -> Tensor:
        """Return what arrives at the first layer, [windows, tokens, hidden].

        Args:
            batch: ``input_ids`` [windows, tokens], and perhaps ``attention_mask``.
        """

        def stop(arrived: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise _LayerDone(arrived)

        return self._run(batch, 0, stop)

    def step(self, index: int, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Run one layer on a batch, as the model around it would: with its own masks and positions.

        Args:
            index: a layer that is loaded.
            batch: ``input_ids`` [windows, tokens], and perhaps ``attention_mask``.
            hidden: what the layer before returned, [windows, tokens, hidden]; None for the first layer.

        Returns:
            What the layer returns, [windows, tokens, hidden].
        """

        def run(arrived: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = self.layers[index](arrived if hidden is None else hidden.to(arrived.device), *args, **kwargs)
            self.forms[type(self.layers[index]).__name__] = isinstance(given, tuple)
            raise _LayerDone(given[0] if isinstance(given, tuple) else given)

        return self._run(batch, index, run)

    def _run(self, batch: Batch, index: int, run: _Answer) -> Tensor:
        with self._staged({index: run}):
            try:
                self.model.base_model(**self._inputs(batch), use_cache=False)
            except _LayerDone as done:
                return done.hidden
        raise ModelError(f"{self.path}.{index}: the model did not run this layer; it cannot be run layer by layer")

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Run what comes after the layers: the last norm and the head.

        Args:
            batch: as for ``step``.
            hidden: what the last layer returned, [windows, tokens, hidden].

        Returns:
            [windows, tokens, vocabulary].
        """
        last = len(self) - 1

        def answer(arrived: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._given(last, hidden.to(arrived.device))

        with self._staged({last: answer}):
            logits: Tensor = self.model(**self._inputs(batch), use_cache=False).logits
            return logits

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask") if name in batch}

    @contextmanager
    def _staged(self, answers: Mapping[int, _Answer]) -> Iterator[None]:
        """Put stages in the layers' places: those without an answer pass on what arrives."""

        def passing(index: int) -> _Answer:
            return lambda arrived, args, kwargs: self._given(index, arrived)

        stages = [_Stage(layer, answers.get(i) or passing(i)) for i, layer in enumerate(self.layers)]
        path, _, name = self.path.rpartition(".")
        owner = self.model.get_submodule(path)
        setattr(owner, name, nn.ModuleList(stages))
        try:
            with torch.no_grad(), self._precision():
                yield
        finally:
            setattr(owner, name, self.layers)

    def _given(self, index: int, hidden: Tensor) -> Any:
        """Return hidden states in the form in which a layer does."""
        return (hidden,) if self.forms[type(self.layers[index]).__name__] else hidden


class LayerStream(LayerRunner):
    """A model of which one decoder layer at a time is in memory.

    Args:
        config: the model's configuration.
        weights: its checkpoint.
        layers: full name of the list of decoder layers.
        dtype: type of the weights in memory; that of the checkpoint if not given.
        device, precision, forms: as of ``LayerRunner``.

    Attributes:
        model: the model, its layers without memory while they are not loaded.

    Raises:
        ModelError: the checkpoint's tensors do not go by the names of the model's parameters.
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
        """Load layers from another checkpoint from now on; what stands outside the layers is kept.

        Raises:
            ModelError: a tensor of the model is not there.
        """
        self._weights = weights
        self._conversions: list[Any] = get_model_conversion_mapping(self.model)
        self._sources = self._find_sources()

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Load a layer's weights, and give their memory back at the end; what was sliced keeps its new shape."""
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
            index: the layer; None for all that stands outside the layers.
        """
        return {name: tensor for name, tensor in self._tensors().items() if self.holds(index, name)}

    def holds(self, index: int | None, name: str) -> bool:
        """Tell whether a tensor is a layer's; ``index`` as of ``tensors_of``."""
        start = f"{self.path}." if index is None else f"{self.path}.{index}."
        return name.startswith(start) == (index is not None)

    def _tensors(self) -> dict[str, Tensor]:
        """Map the full names of all tensors to their values; tied ones come once."""
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied -= {name for name, _ in self.model.named_parameters()}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}

    def _find_sources(self) -> dict[str, list[str]]:
        """Map each tensor of the model to those of the checkpoint that it is made of, as transformers would."""
        renamings = [each for each in self._conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in self._conversions if isinstance(each, WeightConverter)]
        state, sources = self.model.state_dict(), defaultdict(list)
        for key in self._weights:
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            sources[key if key in state and name not in state else name].append(key)
        for name in self._tensors():
            if name not in sources:
                raise ModelError(
                    f"the checkpoint holds nothing that {name} is made of: it is not whole, or cannot be read layer by "
                    "layer"
                )
        return sources

    def _fill(self, names: Sequence[str]) -> None:
        """Load some tensors of the model, with the conversions and types that transformers has for them."""
        keys = [key for name in names for key in self._sources[name]]
        asked = LoadStateDictConfig(
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            device_map={"": self.device},
            weight_mapping=self._conversions,
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, self._weights.read(keys), asked)
        for name, found, expected in info.mismatched_keys:
            raise ModelError(f"{name}: the checkpoint has the shape {list(found)}, the model {list(expected)}")
        for name, why in info.conversion_errors.items():
            raise ModelError(f"{name}: cannot be made of what the checkpoint holds: {why}")


class HiddenStates:
    """What every batch is at, between two layers: [windows, tokens, hidden], on the CPU.

    On the disk, what a layer gives stands beside what it was given until ``advance``, so that a run that was stopped
    can go on from there.

    Args:
        folder: where they lie, in a file for each batch; None for memory.
        layers: how many layers the batches of a stopped run went through; where the folder does not hold what they
            gave, the batches are at the beginning.

    Attributes:
        layers: how many layers all batches went through.
    """

    def __init__(self, folder: Path | None = None, layers: int = 0) -> None:
        self._folder = folder
        self._kept: dict[int, Tensor] = {}
        self.layers = layers if folder is not None and (folder / str(layers)).is_dir() else 0
        if folder is not None and not self.layers:
            self.clear()

    def __getitem__(self, batch: int) -> Tensor:
        if self._folder is None:
            return self._kept[batch]
        path = self._file(self.layers, batch)
        with damaged_as_output_error(path):
            return load_file(path)["hidden"]

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep what a layer gave for a batch."""
        if self._folder is None:
            self._kept[batch] = hidden.cpu()
        else:
            write_tensors(self._file(self.layers + 1, batch), {"hidden": hidden}, {})

    def advance(self) -> None:
        """Note that all batches went through another layer."""
        self._forget(self.layers)
        self.layers += 1

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._forget()

    def _forget(self, *layers: int) -> None:
        gone = self._folder.joinpath(*map(str, layers)) if self._folder else None
        if gone is not None and gone.exists():
            shutil.rmtree(gone)

    def _file(self, layers: int, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / str(layers) / f"{batch}.safetensors"


def walk(stream: LayerRunner, hidden: HiddenStates, first: int | None = None) -> Iterator[int]:
    """Load each layer, and give its memory back when the next is asked for.

    Args:
        stream: the model.
        hidden: what the batches are at; goes on with the layers.
        first: the layer to begin with, where no batch goes through; by default the one that the batches are before.
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
    keep: bool = True,
) -> None:
    """Run one loaded layer on every batch, and let a collector measure it.

    Args:
        stream: the model.
        index: a layer that is loaded.
        batches: as for ``LayerStream.step``.
        hidden: what the batches are at.
        collector: measures the layer.
        keep: take note of what the layer gives; else it was run to be measured alone.
    """
    for number, batch in enumerate(batches):
        if collector:
            collector.begin(batch)
        given = stream.step(index, batch, hidden[number] if hidden.layers else None)
        if collector:
            collector.check()
        if keep:
            hidden.put(number, given)


class _LayerDone(Exception):  # noqa: N818 - not an error: it leaves the model once the layer has run
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stage(nn.Module):
    """What stands in a layer's place while the rest of the model runs."""

    def __init__(self, layer: nn.Module, answer: _Answer) -> None:
        super().__init__()
        # Not a submodule: what the model asks of a layer, such as its attention type, is asked of the real one.
        self.__dict__["_hidden_layer"] = layer
        self._answer = answer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Answer in the layer's place."""
        return self._answer(hidden_states, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_hidden_layer"], name)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter or of a buffer."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def layers_of(sites: Sequence[Site]) -> str:
    """Return the full name of the list of decoder layers that some sites are in.

    Raises:
        ModelError: a site lies in no such list.
    """
    first = sites[0]
    path = first.consumer.partition(f".{first.layer}.")[0]
    for site in sites:
        if not site.consumer.startswith(f"{path}.{site.layer}."):
            raise ModelError(f"{site.consumer} lies in no list of layers {path}; run it whole")
    return path


@torch.no_grad()
def verify(config: PreTrainedConfig, layers: str) -> Forms:
    """Compare a tiny model of a configuration's kind, run layer by layer, with the same one run whole.

    Args:
        config: of the model that shall run layer by layer.
        layers: full name of its list of decoder layers.

    Returns:
        In what form its layers give their hidden states.

    Raises:
        ModelError: the two differ, or the class cannot be run layer by layer.
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
    found, expected = stream.logits(batch, hidden[0]), whole(**batch).logits
    if not torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max())):
        raise ModelError(
            f"models of type {config.model_type!r} cannot be run layer by layer: a tiny one's logits are "
            f"{float((found - expected).abs().max()):.1e} off; run it whole"
        )
    return stream.forms
