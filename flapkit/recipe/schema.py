"""The schema of a recipe: its sections, and their keys with types, defaults and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from flapkit.execution.lightning.loggers import LoggerName
from flapkit.pruning.budget_keys import BudgetSection
from flapkit.system.options import Count, PathText, Section
from flapkit.system.sizes import counted, parse_bytes
from flapkit.text.mix import MixedSource, TextMix, apportion
from flapkit.text.source import DATASET, Split, Subset, TextField, TextSource

UNSUPPORTED = ("fsdp", "deepspeed")
"""Prefixes of the names of Lightning strategies that shard a model and that flapkit does not support."""

LARGEST_SEED = 2**32 - 1

KEYS: Mapping[str, str] = {
    "metric": "metric",
    "searcher": "searcher",
    "compensator": "compensator",
    "adapter": "adapter",
    "exporter": "export",
}
"""Kind of component -> its key in a recipe."""

SEVERAL = ("compensator", "exporter")
"""The kinds of component that a recipe can list several of."""


class ComponentSpec(BaseModel):
    """A component by name, with its options; in a recipe, for example ``al_am`` or ``{name: al_am, min_units: 2}``."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, ser_json_inf_nan="constants")

    name: str = Field(description="Name of the component; `flapkit list` shows them all.")

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that are set, by name."""
        return self.model_extra or {}

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, (Mapping, ComponentSpec)):
            return value
        raise PydanticCustomError("component", "expected a name, or a section with a name and options")


def _check_device_map(value: Any) -> Any:
    if isinstance(value, Mapping) and "disk" in value.values():
        raise PydanticCustomError(
            "offload",
            "no part of the model can be offloaded to the disk; set `execution: layerwise`, which has one layer in "
            "memory at a time",
        )
    return value


DeviceMap = Annotated[
    Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, str | Annotated[Count, Field(ge=0)]],
    BeforeValidator(_check_device_map),
]
"""How accelerate spreads a model: a policy, or the device of each module."""


class Model(Section):
    """The model to prune."""

    path: PathText = Field(
        description="A Hugging Face hub id, a folder or a GGUF file, relative to the current directory, or "
        "`builtin:tiny-llama`, the model that comes with flapkit.",
    )
    file: str | None = Field(
        default=None, min_length=1, description="GGUF file within the folder, or within the hub's repository."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Type that the model computes in; `auto` is the checkpoint's own, and on a CPU float32.",
    )
    save_dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Type of the written weights; `auto` is the dense checkpoint's, unless it is wider than `dtype`.",
    )

    device_map: DeviceMap | None = Field(
        default=None,
        description="Distribute the model over several devices with accelerate, in one process: `auto`, `balanced`, "
        "`balanced_low_0`, `sequential`, or a mapping of modules to devices, such as `{model.embed_tokens: 0, ...}`. "
        "Every statistic is kept on the device of its weights. Nothing is offloaded: if the devices together cannot "
        "hold the model, set `execution: layerwise`.",
    )

    @property
    def source(self) -> str:
        """What to load: the path, with the file in it where there is one."""
        return self.path if self.file is None else f"{self.path.rstrip('/')}/{self.file}"


class Calibration(Section):
    """The text on which statistics are measured."""

    mix: tuple[MixedSource, ...] = Field(
        default=(), description="Instead of `dataset`: several datasets, each with its share of the windows."
    )
    dataset: PathText | None = Field(default=None, validate_default=True, description=DATASET)
    subset: Subset = None
    split: Split = None
    field: TextField = None
    length: Count = Field(default=128, ge=2, description="Tokens in a window.")
    samples: Count = Field(default=1024, ge=1, validate_default=True, description="Windows to draw.")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the draw.")
    batch_size: Count = Field(default=8, ge=1, description="Windows that go through the model at once.")
    statistics_memory: str = Field(
        default="4GB",
        pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?(KB|MB|GB|TB)$",
        description="Memory for statistics, such as `4GB`. If the statistics of all sites need more, they are measured "
        "in several passes over the text, each for a part of the sites.",
    )
    sequential: bool = Field(
        default=False,
        description="Repair in one sweep over the layers, in which each site also corrects the error of the earlier "
        "sites; costs about four forward passes of the text.",
    )

    @field_validator("dataset", "subset", "split", "field")
    @classmethod
    def _one_or_several(cls, value: str | None, info: ValidationInfo) -> str | None:
        mix = info.data.get("mix")
        if mix and value is not None:
            raise PydanticCustomError(
                "mix",
                "expected either `{key}` or `mix`; remove one of them: {key}=null or mix=[]"
                if info.field_name == "dataset"
                else "expected no `{key}` beside `mix`; give it to the entries of `mix`",
                {"key": info.field_name},
            )
        if mix == () and value is None and info.field_name == "dataset":
            raise PydanticKnownError("missing")
        return value

    @field_validator("samples")
    @classmethod
    def _some_of_each(cls, samples: int, info: ValidationInfo) -> int:
        mix = info.data.get("mix")
        for index, count in enumerate(apportion(samples, [entry.share for entry in mix]) if mix else ()):
            if not count:
                raise PydanticCustomError(
                    "mix",
                    "calibration.mix.{index} gets none of {windows}; increase its share, or the samples",
                    {"index": index, "windows": counted(samples, "window")},
                )
        return samples

    @property
    def text(self) -> TextMix:
        """Where the text comes from."""
        if self.dataset is not None:
            source = TextSource(dataset=self.dataset, subset=self.subset, split=self.split, field=self.field)
            return TextMix.of(source)
        keys = tuple(f"calibration.mix.{index}" for index in range(len(self.mix)))
        return TextMix(self.mix, tuple(entry.share for entry in self.mix), keys)

    @property
    def statistics_bytes(self) -> int:
        """``statistics_memory`` as a number."""
        return parse_bytes(self.statistics_memory)


BatchSize = Annotated[Count, Field(ge=1)] | Literal["auto"]


class Perplexity(TextSource):
    """One measurement of perplexity, before and after pruning."""

    length: Count = Field(default=128, ge=2, description="Tokens in a window.")
    stride: Count | None = Field(
        default=None,
        ge=1,
        description="Tokens from the start of one window to the start of the next: windows overlap, and each token is "
        "scored once, with the window's earlier tokens as context. Without it windows do not overlap, and the loss is "
        "the mean over windows: the protocol of FLAP's released code.",
    )
    windows: Count | None = Field(
        default=None, ge=1, description="Windows to measure, from the start of the text; all if not given."
    )
    batch_size: BatchSize = Field(
        default="auto", description="Windows per batch; `auto` uses as many as the memory allows."
    )

    @field_validator("stride")
    @classmethod
    def _no_gaps(cls, stride: int | None, info: ValidationInfo) -> int | None:
        length = info.data.get("length")
        if stride is not None and length is not None and stride > length:
            raise PydanticCustomError(
                "stride",
                "expected at most the window's length, {length}, got {stride}; tokens between windows would not be "
                "scored",
                {"length": length, "stride": stride},
            )
        return stride


class ZeroShot(Section):
    """Zero-shot tasks of lm-eval, run before and after pruning; they need the extra `flapkit[zeroshot]`."""

    tasks: tuple[str, ...] = Field(
        min_length=1, description="Tasks and groups by lm-eval's names; `lm-eval ls tasks` lists them."
    )
    data_dir: PathText | None = Field(
        default=None,
        description="Folder with a .jsonl file for each task, for machines without a network; possible for boolq, "
        "piqa, hellaswag, winogrande, arc_easy, arc_challenge and openbookqa. Without it lm-eval downloads the "
        "official data.",
    )
    limit: Count | None = Field(default=None, ge=1, description="First items of each task to use; all if not given.")
    batch_size: BatchSize = Field(
        default="auto", description="Requests per batch; `auto` uses as many as the memory allows."
    )


class Message(Section):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="The speaker.")
    content: str = Field(description="The text.")


def _ends_with_user(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if messages[-1].role != "user":
        raise PydanticCustomError("messages", "the last message of a prompt has to be the user's; the model answers it")
    return messages


Messages = Annotated[tuple[Message, ...], Field(min_length=1), AfterValidator(_ends_with_user)]
"""A conversation that the model answers."""


class Samples(Section):
    """Prompts that the model continues before and after pruning."""

    prompts: tuple[str | Messages, ...] = Field(
        min_length=1,
        description="Prompts to continue: plain text, or a conversation in the model's chat format, as a list of "
        "messages `{role: user, content: ...}`.",
    )
    tokens: Count = Field(default=64, ge=1, description="Maximum number of tokens to generate for a prompt.")
    temperature: float = Field(
        default=0.0,
        ge=0,
        description="Sampling temperature; 0 always takes the most likely token.",
    )
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="Seed of the sampling.")


class Evaluate(Section):
    """What is measured before and after pruning."""

    perplexity: tuple[Perplexity, ...] = Field(default=(), description="Texts to measure perplexity on.")
    zero_shot: ZeroShot | None = Field(default=None, description="Zero-shot tasks; none if not given.")
    samples: Samples | None = Field(default=None, description="Text that both models generate, shown side by side.")


class ReportSection(Section):
    """Optional parts of the run's report."""

    error_windows: Count = Field(
        default=8,
        ge=0,
        description="Held-out calibration windows on which the error of every site is measured; 0 skips it.",
    )
    figures: tuple[Literal["png", "svg"], ...] = Field(
        default=(),
        description="File formats in which the report's figures are also written, into the folder `figures`.",
    )


def _as_list(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


Components = Annotated[
    tuple[ComponentSpec, ...], BeforeValidator(_as_list, json_schema_input_type=ComponentSpec | list[ComponentSpec])
]
"""One component, or a list of them, which may be empty."""


def _check_strategy(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(UNSUPPORTED):
        raise PydanticCustomError(
            "sharding",
            "{value} is not supported; for a model that does not fit on one GPU, set `execution: layerwise`, or, to "
            "evaluate or recover it, `strategy: model_parallel`, which shards it over the devices",
            {"value": value},
        )
    return value


class TrainerSection(Section):
    """Devices and options of PyTorch Lightning."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = Field(
        default="auto", description="Kind of device."
    )
    devices: Annotated[Count, Field(ge=1)] | Literal["auto"] = Field(default=1, description="Devices per machine.")
    num_nodes: Count = Field(default=1, ge=1, description="Number of machines.")
    strategy: Annotated[Literal["auto", "ddp", "model_parallel"], BeforeValidator(_check_strategy)] = Field(
        default="auto",
        description="How several devices share the work: with `ddp` each holds the model and takes a share of the "
        "windows; with `model_parallel` each also holds a share of the weights, to evaluate or recover a model that "
        "does not fit on one device; `auto` is Lightning's choice.",
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"] | None = Field(
        default=None,
        description="Lightning's precision; by default the model's own type. A float16 model is trained in mixed "
        "precision.",
    )

    @field_validator("precision")
    @classmethod
    def _is_for_strategy(cls, precision: str | None, info: ValidationInfo) -> str | None:
        sharded = info.data.get("strategy") == "model_parallel"
        if sharded and precision not in (None, "32-true", "bf16-mixed"):
            raise PydanticCustomError(
                "precision",
                "{precision} is not supported with `strategy: model_parallel`; set `bf16-mixed`, or the type of the "
                "weights in `model.dtype`",
                {"precision": precision},
            )
        return precision

    @property
    def converts_weights(self) -> bool:
        """Whether Lightning converts the weights themselves to the precision."""
        return self.precision in ("bf16-true", "16-true")

    accumulate_grad_batches: Count = Field(default=1, ge=1, description="In training: batches per optimizer step.")
    gradient_clip_val: float | None = Field(
        default=1.0, gt=0, description="In training: maximum norm of the gradients; `null` does not clip."
    )
    logger: Annotated[
        tuple[LoggerName, ...],
        BeforeValidator(_as_list, json_schema_input_type=LoggerName | list[LoggerName]),
    ] = Field(
        default=("csv",),
        description="Where metrics of every stage and of training are logged: a name or a list, `[]` for nowhere. "
        "`csv` and `tensorboard` write into the output's folder `logs`; all but `csv` need their package.",
    )


Mode = Literal["whole", "layerwise"]


class Execution(Section):
    """How the model is held in memory: ``layerwise`` or ``{mode: layerwise, hidden_states: disk}``."""

    mode: Mode = Field(
        default="whole",
        description="`whole` holds the whole model in memory; `layerwise` one decoder layer at a time, read from the "
        "checkpoint.",
    )
    hidden_states: Literal["memory", "disk"] = Field(
        default="memory",
        description="Layerwise: where the hidden states between two layers are stored. With `disk` they are in the "
        "work folder, and an interrupted run resumes at its last layer.",
    )


def _as_execution(value: Any) -> Any:
    return {"mode": value} if isinstance(value, str) else value


class Recipe(Section):
    """A run: the model, the text, the components and the budget."""

    model: Model = Field(description="The model to prune.")
    adapter: ComponentSpec | None = Field(
        default=ComponentSpec(name="auto"),
        description="Architecture adapter; `auto` takes the one for the model's type, or derives one.",
    )
    calibration: Calibration = Field(description="The text on which statistics are measured.")
    metric: ComponentSpec = Field(
        default=ComponentSpec(name="wifv"), description="Importance metric: scores the units."
    )
    searcher: ComponentSpec = Field(
        default=ComponentSpec(name="al_am"), description="Structure searcher: chooses the units to remove."
    )
    compensator: Components = Field(
        default=(ComponentSpec(name="bias"),),
        description="Compensator, or a list of them: repairs the pruned model. At most one corrects weights in closed "
        "form, and at most one trains; `[]` repairs nothing.",
    )
    budget: BudgetSection = Field(description="How much to remove.")
    evaluate: Evaluate = Field(default=Evaluate(), description="What is measured before and after pruning.")
    report: ReportSection = Field(default=ReportSection(), description="Optional parts of the run's report.")
    trainer: TrainerSection = Field(default=TrainerSection(), description="Devices and options of PyTorch Lightning.")
    execution: Annotated[Execution, BeforeValidator(_as_execution, json_schema_input_type=Mode | Execution)] = Field(
        default=Execution(), description="How the model is held in memory: a mode, or a section."
    )
    export: Components = Field(
        default=(),
        description="Exporter, or a list of them: further formats of the pruned model, written below `exports/`.",
    )
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Files of your own plugins, relative to the recipe's folder; given by `--set`, to the current "
        "directory.",
    )
    output: PathText = Field(description="Output folder, relative to the current directory.")
