"""compressed-tensors: a pruned model with quantised linears, for transformers and vLLM."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flapkit.interfaces import Checkpoint, DType, Exporter, ModelError, Prospect, Runner, open_weights, skeleton
from flapkit_exporters.hf import copy_beside

if TYPE_CHECKING:
    from compressed_tensors import quantization as ct
    from transformers import PreTrainedConfig

Scheme = Literal["w8a8", "w4a16", "fp8"]

PRESETS: Mapping[Scheme, str] = {"w8a8": "W8A8", "w4a16": "W4A16", "fp8": "FP8_DYNAMIC"}
"""Schemes -> their names in compressed-tensors."""

GROUP_SIZES = (128, 64, 32)
"""The group sizes, in the order in which one is recommended."""

CARD = "README.md"
NOTE = """
## Quantised

The linears of the layers are quantised in the format compressed-tensors, scheme {preset}; embeddings and head are
not. transformers needs the package `compressed-tensors` to load the folder. flapkit does not load it, but the model
that it was exported from.
"""


@dataclass(frozen=True)
class CompressedTensors(Exporter):
    """A folder in the format compressed-tensors: the linears of the layers are quantised, embeddings and head are not.

    Weights are rounded to nearest, symmetrically, without calibration. vLLM loads the folder without further packages;
    transformers needs the package compressed-tensors.

    Args:
        scheme: what is quantised, and to what.
        group_size: input channels that share a scale.
        dtype: data type of everything else.
    """

    name = "compressed-tensors"
    extra = "compressed-tensors"

    scheme: Annotated[
        Scheme,
        Field(
            description="`w8a8`: 8-bit integers, weights with a scale per output channel, inputs with one per token, "
            "computed as the model runs; `w4a16`: weights in 4 bits with a scale per group of input channels; `fp8`: "
            "as `w8a8`, in 8-bit floating point."
        ),
    ] = "w8a8"
    group_size: Annotated[
        Literal[32, 64, 128],
        Field(description="Input channels that share a scale in `w4a16`; it must divide the input of every linear."),
    ] = 128
    dtype: Annotated[
        DType, Field(description="Data type of the other weights and of the scales; `auto` is the checkpoint's.")
    ] = "auto"

    @property
    def packages(self) -> Sequence[str]:
        """compressed-tensors."""
        return ["compressed_tensors"]

    @property
    def label(self) -> str:
        """The name with the scheme: one folder per scheme."""
        return f"{self.name}-{self.scheme}"

    @property
    def tolerance(self) -> None:
        """None: the effect of rounding is reported only."""
        return

    def check(self, prospect: Prospect) -> None:
        """Refuse consumers that are no linears, and widths that groups do not divide."""
        linears = linears_of(prospect.config)
        for consumer in _consumers(prospect):
            if consumer not in linears:
                raise ModelError(
                    f"export {self.name}: {consumer} is not a torch.nn.Linear, and only those are quantised; export "
                    f"{prospect.family!r} models to hf"
                )
        if self.scheme == "w4a16":
            self._check_groups(prospect, linears)

    def _check_groups(self, prospect: Prospect, inputs: Mapping[str, int]) -> None:
        """Raise ``ModelError`` if groups do not divide the input channels of each linear, as they are or will be."""
        group, consumers = self.group_size, _consumers(prospect)
        other = next((size for size in GROUP_SIZES if all(c % size == 0 for c in inputs.values())), None)
        for name, channels in sorted(inputs.items(), key=lambda linear: linear[0] in consumers):
            says = f"export {self.name}: {name} has {channels} input channels, which groups of {group} do not divide"
            if channels % group:
                # Pruning changes the inputs of consumers alone, and leaves some of them whole.
                if name in consumers and prospect.multiple_of is None:
                    raise ModelError(f"{says}; prune with budget.multiple_of: {group}, or use scheme: w8a8")
                raise ModelError(f"{says}; set {f'group_size: {other}, or ' if other else ''}scheme: w8a8")
        for name, site in consumers.items():
            steps = math.lcm(prospect.multiple_of or group, site.runs * site.channels_per_unit)
            if steps % group:
                raise ModelError(
                    f"export {self.name}: groups of {group} may not divide the pruned width of {name}; "
                    f"set budget.multiple_of: {group}"
                )

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Round the weights of one linear after the other, and write them with the settings that tell how."""
        from compressed_tensors import quantization as ct
        from compressed_tensors.compressors.format import infer_module_format
        from huggingface_hub import save_torch_state_dict

        config, scheme = checkpoint.prospect.config, self._scheme()
        linears = linears_of(config)
        type_: Any = config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        tensors: dict[str, Tensor] = {}
        for name, tensor in open_weights(checkpoint.folder).items():
            module, _, leaf = name.rpartition(".")
            if module in linears and leaf == "weight":
                tensors |= {f"{module}.{part}": value for part, value in quantise(tensor, scheme, type_).items()}
            else:
                tensors[name] = tensor.to(type_)
        save_torch_state_dict(tensors, path)
        copy_beside(checkpoint.folder, path)
        settings = ct.QuantizationConfig(
            config_groups={"group_0": scheme},
            format=infer_module_format(nn.Linear, scheme).value,
            quantization_status=ct.QuantizationStatus.COMPRESSED,
            ignore=[_head(config)],
        )
        written = json.loads((path / "config.json").read_text(encoding="utf-8"))
        written |= {"dtype": str(type_).removeprefix("torch."), "quantization_config": settings.model_dump(mode="json")}
        (path / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        with (path / CARD).open("a", encoding="utf-8") as card:
            card.write(NOTE.format(preset=PRESETS[self.scheme]))

    def _scheme(self) -> ct.QuantizationScheme:
        from compressed_tensors import quantization as ct

        scheme = ct.preset_name_to_scheme(PRESETS[self.scheme], ["Linear"])
        if scheme.weights.group_size:
            scheme.weights.group_size = self.group_size
        return scheme

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load the folder with transformers, which computes with the rounded values in float32."""
        import transformers

        # compressed-tensors shows bars while it loads a model, and while it unpacks the weights for the first text.
        with redirect_stderr(io.StringIO()), torch.no_grad():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)

        @torch.no_grad()
        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = model(tokens[None], use_cache=False).logits[0]
            return logits

        yield run


def linears_of(config: PreTrainedConfig) -> dict[str, int]:
    """Map the names of a model's linears, but for its head, to the numbers of their input channels."""
    modules, head = skeleton(config).named_modules(), _head(config)
    return {name: module.in_features for name, module in modules if isinstance(module, nn.Linear) and name != head}


def quantise(weight: Tensor, scheme: ct.QuantizationScheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round a linear's weight to nearest, symmetrically.

    Args:
        weight: the weight [out, in].
        scheme: how compressed-tensors is to round.
        dtype: data type of the scales.

    Returns:
        The tensors that compressed-tensors stores for it.
    """
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    weight = weight.float()
    low, high = weight.unflatten(-1, (-1, scheme.weights.group_size or weight.shape[-1])).aminmax(dim=-1)
    scale, _ = ct.utils.calculate_qparams(low, high, scheme.weights)
    # Rounded before it is used, so that the weights are rounded by the scale that is stored.
    tensors = {"weight": weight, "weight_scale": scale.to(dtype).float()}
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, scheme).value)
    stored: dict[str, Tensor] = compressor.compress(tensors, scheme)
    return {**stored, "weight_scale": scale.to(dtype)}


def _consumers(prospect: Prospect) -> dict[str, Any]:
    """Map the names of the consumers to their sites."""
    return {site.weight.rpartition(".")[0]: site for site in prospect.sites}


def _head(config: PreTrainedConfig) -> str:
    """Return the name of a model's head."""
    model = skeleton(config)
    head = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name
