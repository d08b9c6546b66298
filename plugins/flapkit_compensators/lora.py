"""LoRA recovery: train low-rank updates of the pruned linears with peft."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from flapkit.interfaces import (
    Compensator,
    Count,
    ModelError,
    RecipeError,
    Recovery,
    Site,
    Training,
    did_you_mean,
    is_conv1d,
    is_linear,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Lora(Training, Compensator):
    """Train low-rank updates of the pruned linears: W' = W + (alpha / rank) B A.

    LoRA (arXiv 2106.09685), equation 3. B is initialised to zero, so that training starts from the pruned model.
    """

    name = "lora"

    rank: Annotated[Count, Field(ge=1, description="Rank of each update.")] = 8
    alpha: Annotated[Count, Field(ge=1, description="Updates are scaled by alpha / rank.")] = 16
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout of the updates' inputs.")] = 0.0
    targets: Annotated[
        Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)],
        Field(
            description="Linears to train, as full names or their last parts, such as `q_proj`; `auto`: the linears "
            "and the stacked experts of all pruned sites."
        ),
    ] = "auto"
    merge: Annotated[
        bool,
        Field(description="Fold the updates into the weights; otherwise they are saved as a peft adapter, `adapter/`."),
    ] = True

    def recovery(self) -> Recovery:
        """Describe the training."""
        return Recovery(self, self._attach, self.merge)

    def _attach(self, model: PreTrainedModel, sites: Sequence[Site]) -> Adapter:
        """Put the updates into the model, in place, and freeze everything else."""
        import peft

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.targets == "auto":
            names, stacks = linears_of_sites(model, sites), stacks_of_sites(sites)
        else:
            names, stacks = named_linears(model, self.targets), []
        if not names and not stacks:
            raise ModelError(f"lora: no pruned site of this {type(model).__name__} is a linear; set `targets`")
        if stacks and self.dropout:
            raise RecipeError("lora: dropout: not supported for stacked experts; set it to 0, or set `targets`")
        conv = bool(names) and all(is_conv1d(model.get_submodule(name)) for name in names)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            target_parameters=stacks or None,
            fan_in_fan_out=conv,
        )
        # A model on the meta device stays there: its parameters are only counted.
        place = torch.device("meta") if model.device.type == "meta" else nullcontext()
        with warnings.catch_warnings(), place:
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return Adapter(peft.get_peft_model(model, config), trained)


class Adapter:
    """A model with trainable low-rank updates, wrapped by peft.

    Args:
        wrapper: a ``peft.PeftModel``.
        trained: the parameters that were trainable before peft froze them.
    """

    def __init__(self, wrapper: Any, trained: Sequence[nn.Parameter]) -> None:
        self._wrapper = wrapper
        self._trained = trained

    def merge_(self) -> None:
        """Fold the updates into the weights."""
        self._wrapper.merge_and_unload()
        self._thaw_()

    def remove_(self) -> None:
        """Remove the updates."""
        self._wrapper.unload()
        self._thaw_()

    def _thaw_(self) -> None:
        for parameter in self._trained:
            parameter.requires_grad_()

    def files(self) -> Mapping[str, bytes]:
        """Return the adapter as peft saves it."""
        with tempfile.TemporaryDirectory() as folder:
            # Otherwise peft queries the hub for the base model's vocabulary.
            self._wrapper.save_pretrained(folder, save_embedding_layers=False)
            return {
                f"adapter/{path.name}": path.read_bytes()
                for path in sorted(Path(folder).iterdir())
                if path.name.startswith("adapter_")
            }


def linears_of_sites(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """List the pruned linears: every site's consumer, and the linears coupled to it.

    Coupled parameters of other modules, such as norms, are skipped.
    """
    modules = dict(model.named_modules())
    params = [name for site in sites for name in (site.weight, *(coupling.param for coupling in site.couplings))]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in params)
    return [name for name in owners if is_linear(modules.get(name))]


def stacks_of_sites(sites: Sequence[Site]) -> list[str]:
    """List the pruned parameters that stack the weights of several experts."""
    params = [
        name
        for site in sites
        if site.stacked
        for name in (site.weight, *(coupling.param for coupling in site.couplings))
        if name.rpartition(".")[0] == site.weight.rpartition(".")[0]
    ]
    return [name for name in dict.fromkeys(params) if not name.endswith("bias")]


def named_linears(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """List the linears whose full names, or their last parts, are among the targets.

    A head tied to the embeddings is skipped: an update would change both.

    Raises:
        RecipeError: a target matches no linear.
    """
    tied = model.get_input_embeddings().weight
    linears = [name for name, module in model.named_modules() if is_linear(module) and module.weight is not tied]
    names: dict[str, None] = {}
    for target in targets:
        matching = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not matching:
            known = {name.rpartition(".")[2] for name in linears}
            raise RecipeError(f"lora: targets: there is no linear {target!r}{did_you_mean(target, known)}")
        names.update(dict.fromkeys(matching))
    return list(names)
