"""Conformance checks for plugin authors.

```python
from flapkit.testing import check_adapter

def test_my_family():
    check_adapter(MY_FAMILY)
```
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flapkit.api import prune_
from flapkit.checkpoint.load import load
from flapkit.checkpoint.save import save
from flapkit.model.adapter import ArchitectureAdapter, FamilyAdapter, adapter_class
from flapkit.model.declaration import Family
from flapkit.model.derive import Auto
from flapkit.model.empty import CAUSAL_LM, auto_class
from flapkit.model.history import plan_of
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.spread import vocabulary_of
from flapkit.model.surgery import Correction, apply_plan_, consumer_of, mask_, slice_, weight_of
from flapkit.model.tiny import doubled, tiny_config, tiny_model
from flapkit.model.verify import (
    IMPLEMENTATIONS,
    logits_of,
    plan_without_blocks,
    random_plan,
    verify,
    verify_without_blocks,
)
from flapkit.pruning.collector import measure
from flapkit.pruning.moments import Moments
from flapkit.system.errors import FlapkitError, ModelError

BASE = "default"

FORMS: Mapping[str, Mapping[str, Any]] = {
    BASE: {},
    "multi-head": {"num_key_value_heads": 4},
    "one key/value head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True, "qkv_bias": True, "use_bias": True},
    "norms of heads": {"use_qk_norm": True, "qk_layernorm": True},
    "grouped heads": {"new_decoder_architecture": True},
    "ALiBi": {"alibi": True, "multi_query": False, "num_kv_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "not tied": {"tie_word_embeddings": False},
}
"""Name -> changes of a tiny model's configuration, for classes with such options."""

BFLOAT16_ERROR = 0.05
"""Largest mean error that bfloat16 explains, as a fraction of the logits' mean size; experts may be routed
differently."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A tiny model to check.

    Args:
        adapter: the adapter.
        config: a tiny model's configuration.
        model: the tiny model, in float32; checks copy it before they change it.
        sites: its sites.
    """

    adapter: ArchitectureAdapter
    config: PreTrainedConfig
    model: PreTrainedModel
    sites: tuple[Site, ...]

    @property
    def tokens(self) -> Tensor:
        """Calibration tokens [64, 12]."""
        return torch.randint(2, vocabulary_of(self.model), (64, 12), generator=torch.Generator().manual_seed(1))

    def pruned(self, ratio: float = 0.4, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PruningPlan]:
        """Prune a copy with flapkit's defaults."""
        model: Any = copy.deepcopy(self.model)
        model = model.to(dtype=dtype)
        return model, prune_(model, self.tokens, ratio=ratio, adapter=self.adapter)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one check on one form of a model.

    Args:
        model_type: type of the model.
        form: its form, a name in ``FORMS``.
        check: name of the check, in ``CHECKS``.
        figure: the measurement, as text; if the check failed, the reason.
        passed: whether the check passed.
        refused: whether the adapter refuses such models, so that they are never pruned.
    """

    model_type: str
    form: str
    check: str
    figure: str
    passed: bool = True
    refused: bool = False


def sliced_is_masked(subject: Subject) -> str:
    """Compare a sliced with a masked model: padded, cached, with every attention implementation."""
    error, names = 0.0, []
    for name in IMPLEMENTATIONS:
        try:
            model = tiny_model(subject.config, attention=name)
        except ModelError:
            continue
        error = max(error, verify(model, subject.sites).error)
        names.append(name)
    return f"{error:.0e} ({', '.join(names)})"


def query_heads(subject: Subject) -> str:
    """Compare them with single query heads as units."""
    if not isinstance(subject.adapter, FamilyAdapter):
        return "no declaration"
    try:
        sites = type(subject.adapter)(unit="query_head").sites(subject.config)
    except ModelError:
        return "not offered"
    return f"{verify(subject.model, sites).error:.0e}"


def whole_experts(subject: Subject) -> str:
    """Compare them with whole experts as units, alone, with channels of the others, and with these removed after them.

    The last one is saved and loaded.
    """
    if not isinstance(subject.adapter, FamilyAdapter):
        return "no declaration"
    adapter = type(subject.adapter)(expert_unit="expert")
    try:
        sites = adapter.sites(subject.config)
    except ModelError:
        return "not offered"
    both = type(subject.adapter)(expert_unit="both").sites(subject.config)
    error = max(verify(subject.model, units).error for units in (sites, both))
    model = copy.deepcopy(subject.model)
    apply_plan_(model, sites, random_plan(sites), {})
    again = subject.adapter.sites(model.config)
    error = max(error, verify(model, again).error)
    apply_plan_(model, again, random_plan(again), {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned"
        save(model, path, plan_of(model) or PruningPlan())
        _check_loaded(model, load(path), torch.float32)
    return f"{error:.0e}"


def counts_are_exact(subject: Subject) -> str:
    """Compare the removed parameters with the plan's count, and the pruned sites with the plan."""
    model, plan = copy.deepcopy(subject.model), random_plan(subject.sites)
    apply_plan_(model, subject.sites, plan, {})
    removed = subject.model.num_parameters() - model.num_parameters()
    if removed != plan.removed_params(subject.sites):
        raise ModelError(f"{removed} parameters were removed; the plan counts {plan.removed_params(subject.sites)}")
    again = subject.adapter.sites(model.config)
    expected = {site.name: len(plan.keep[site.name]) * site.channels_per_unit for site in subject.sites}
    if {site.name: site.channels for site in again} != expected:
        raise ModelError("the sites of the pruned model's configuration differ from those of the plan")
    return "exact"


@torch.no_grad()
def constant_channels_cost_nothing(subject: Subject) -> str:
    """Remove constant MLP channels, with their mean as a bias: the logits must not change."""
    model = copy.deepcopy(subject.model)
    sites = [site for site in subject.sites if site.kind == "mlp"]
    removed = range(8 if all(site.multiple > 1 for site in sites) else 3)
    for site in sites:
        for coupling in site.couplings:
            param = model.get_parameter(coupling.param)
            if coupling.numel > 1:
                rows = param if site.expert is None else param[site.expert]
                indices = torch.tensor(list(coupling.indices_of(removed)))
                rows.index_fill_(coupling.dim - (site.expert is not None), indices, 0)
    statistics = measure(model, sites, [Moments], [{"input_ids": subject.tokens}])
    plan = PruningPlan({site.name: tuple(range(len(removed), site.units)) for site in sites})
    corrections = {}
    for site in sites:
        moments = statistics[site.name][Moments]
        if moments.tokens > 1 and moments.variance[: len(removed)].abs().max() > 1e-12:
            largest = moments.variance[: len(removed)].max()
            raise ModelError(f"{site.name}: channels without weights have a variance of {largest:.0e}")
        weight = weight_of(model, site)[:, : len(removed)].double()
        corrections[site.name] = Correction(None, weight @ moments.mean[: len(removed)])
    expected = model(subject.tokens[:4]).logits
    slice_(model, sites, plan, corrections)
    return _same(model(subject.tokens[:4]).logits, expected, 1e-4)


def statistics_ignore_batches(subject: Subject) -> str:
    """Measure in one batch and in small shuffled ones: the statistics must be equal."""
    tokens = subject.tokens
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(3))
    whole = measure(subject.model, subject.sites, [Moments], [{"input_ids": tokens}])
    parts = measure(subject.model, subject.sites, [Moments], [{"input_ids": part} for part in tokens[order].split(7)])
    worst = 0.0
    for site in subject.sites:
        one, other = whole[site.name][Moments], parts[site.name][Moments]
        if one.tokens != other.tokens:
            raise ModelError(f"{site.name}: {one.tokens} tokens in one batch, {other.tokens} in several")
        if one.tokens > 1:
            worst = max(worst, float((one.variance - other.variance).abs().max() / one.variance.abs().max()))
    if not worst < 1e-3:
        raise ModelError(f"the variances differ by {worst:.0e}")
    return f"{worst:.0e}"


@torch.no_grad()
def nothing_removed_is_the_identity(subject: Subject) -> str:
    """Apply a plan that keeps all units."""
    model = copy.deepcopy(subject.model)
    apply_plan_(model, subject.sites, PruningPlan({site.name: tuple(range(site.units)) for site in subject.sites}), {})
    if not torch.equal(logits_of(model), logits_of(subject.model)):
        raise ModelError("a plan that keeps every unit changes the logits")
    return "identical"


def saved_is_loaded(subject: Subject) -> str:
    """Save and load in float32 and bfloat16, in several files: the tensors and the logits must be equal."""
    for dtype in (torch.float32, torch.bfloat16):
        model, plan = subject.pruned(dtype=dtype)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pruned"
            save(model, path, plan, max_shard_size="30KB")
            auto: Any = getattr(transformers, auto_class(subject.config.model_type) or CAUSAL_LM)
            for loaded in (load(path), auto.from_pretrained(path)):
                _check_loaded(model, loaded, dtype)
    return "bit for bit"


def _check_loaded(model: PreTrainedModel, loaded: Any, dtype: torch.dtype) -> None:
    expected, tensors = model.state_dict(), loaded.state_dict()
    if expected.keys() != tensors.keys():
        raise ModelError(f"loaded tensors differ: {sorted(expected.keys() ^ tensors.keys())}")
    for name, tensor in expected.items():
        if not torch.equal(tensor, tensors[name]):
            raise ModelError(f"{name} in {dtype} differs after saving and loading")
    # Compare copies: some kernels round by alignment, which is arbitrary in a mapped file. Only in float32: buffers
    # that are not in the checkpoint are created in float32, and `to` has rounded them in the pruned model.
    if dtype == torch.float32:
        one, other = logits_of(copy.deepcopy(model)), logits_of(copy.deepcopy(loaded.eval()))
        if not torch.equal(one, other):
            raise ModelError(f"the loaded model's logits differ by {float((one - other).abs().max()):.0e}")


@torch.no_grad()
def generates(subject: Subject) -> str:
    """Generate greedily with a cache, as the masked model does."""
    plan = random_plan(subject.sites)
    masked, sliced = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    mask_(masked, subject.sites, plan)
    apply_plan_(sliced, subject.sites, plan, {})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts: list[Any] = [model.generate(subject.tokens[:2], **options) for model in (masked, sliced)]  # type: ignore[operator]
    if not torch.equal(*texts):
        raise ModelError("the sliced and the masked model generate different texts")
    return f"{texts[0].shape[1] - subject.tokens.shape[1]} equal tokens"


@torch.no_grad()
def runs_in_bfloat16(subject: Subject) -> str:
    """Compare a sliced with a masked model in bfloat16: only rounding may differ."""
    model: Any = copy.deepcopy(subject.model)
    model, plan = model.to(dtype=torch.bfloat16), random_plan(subject.sites)
    masked = copy.deepcopy(model)
    mask_(masked, subject.sites, plan)
    apply_plan_(model, subject.sites, plan, {})
    expected = logits_of(masked)
    error = float((logits_of(model) - expected).abs().mean() / expected.abs().mean())
    if not error <= BFLOAT16_ERROR:
        raise ModelError(f"the logits differ by {error:.0e} of their mean size; {BFLOAT16_ERROR} is allowed")
    return f"{error:.0e}"


@torch.no_grad()
def whole_blocks_go(subject: Subject) -> str:
    """Remove an attention and an MLP altogether, and save, load, and generate with the KV cache as without."""
    model = tiny_model(doubled(subject.config))
    sites = subject.adapter.sites(model.config)
    if not any(site.removable for site in sites):
        return "declared to stay"
    error, plan, sliced = verify_without_blocks(model, sites), plan_without_blocks(sites), copy.deepcopy(model)
    apply_plan_(sliced, sites, plan, {})
    if model.num_parameters() - sliced.num_parameters() != plan.removed_params(sites):
        raise ModelError("the parameters removed are not those that the plan counts")
    with tempfile.TemporaryDirectory() as folder:
        save(sliced, Path(folder) / "pruned", plan)
        loaded: Any = load(Path(folder) / "pruned")
    _check_loaded(sliced, loaded, torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, whole = (loaded.generate(subject.tokens[:2], **options, use_cache=cache) for cache in (True, False))
    if not torch.equal(cached, whole):
        raise ModelError("the model without blocks generates another text with the KV cache")
    return f"{error:.0e}"


def trains(subject: Subject) -> str:
    """Train a pruned model for a few steps: its loss must fall, and its sliced weights change."""
    model, _ = subject.pruned()
    before = {site.weight: model.get_parameter(site.weight).detach().clone() for site in subject.sites}
    first, last = _train(model, subject.tokens, 1e-2)
    if unchanged := [name for name, old in before.items() if torch.equal(model.get_parameter(name), old)]:
        raise ModelError(f"training does not change {unchanged[0]}")
    return f"loss {first:.2f} to {last:.2f}"


def lora_trains(subject: Subject) -> str:
    """Train LoRA on the consumers of a pruned model."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return "peft is not installed"
    model, _ = subject.pruned()
    linears = {site.consumer: consumer_of(model, site) for site in subject.sites if not site.stacked}
    transposed = any(isinstance(linear, Conv1D) for linear in linears.values())
    options = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(linears), fan_in_fan_out=transposed)
    tuned: Any = get_peft_model(model, options)
    first, last = _train(tuned, subject.tokens, 5e-2)
    return f"loss {first:.2f} to {last:.2f}"


Check = Callable[[Subject], str]

CHECKS: Mapping[str, Check] = {
    "sliced is masked": sliced_is_masked,
    "query heads": query_heads,
    "whole experts": whole_experts,
    "counts": counts_are_exact,
    "constant channels": constant_channels_cost_nothing,
    "statistics": statistics_ignore_batches,
    "ratio 0": nothing_removed_is_the_identity,
    "whole blocks": whole_blocks_go,
    "save and load": saved_is_loaded,
    "generate": generates,
    "bfloat16": runs_in_bfloat16,
    "trains": trains,
    "LoRA": lora_trains,
}
"""Name -> check; a check returns its measurement, or raises an error if it fails."""


def conformance(
    adapter: Family | ArchitectureAdapter,
    config: PreTrainedConfig | str | None = None,
    *,
    forms: Sequence[str] = tuple(FORMS),
    checks: Sequence[str] = tuple(CHECKS),
    **changes: Any,
) -> Iterator[Outcome]:
    """Run every check on tiny random models of an adapter's classes.

    Args:
        adapter: a declaration, or an adapter.
        config: a configuration or a model type; by default each model type of a declaration.
        forms: names in ``FORMS``; forms for which a class has no option are skipped.
        checks: names in ``CHECKS``.
        changes: options of the tiny models' configuration.

    Yields:
        The outcomes, one at a time.

    Raises:
        ModelError: transformers does not know a model type.
    """
    adapter = adapter_class(adapter)() if isinstance(adapter, Family) else adapter
    if config is None and not isinstance(adapter, FamilyAdapter):
        raise ModelError(f"adapter {adapter.name!r} declares no model types; give a configuration")
    types: Sequence[Any] = [config] if config is not None else type(adapter).family.model_types  # type: ignore[attr-defined]
    for model_type in types:
        base = tiny_config(model_type, **changes)
        for form, tiny in _forms(base, forms):
            yield from _check(adapter, tiny, form, checks)


def check_adapter(
    adapter: Family | ArchitectureAdapter, config: PreTrainedConfig | str | None = None, **options: Any
) -> None:
    """Run every check for an adapter on tiny random models: a plugin author's test is this one call.

    Args:
        adapter: a declaration, or an adapter.
        config: a configuration or a model type; by default each model type of a declaration.
        options: as for ``conformance``.

    Raises:
        ModelError: checks failed; the message lists them with their reasons.
    """
    failed = [outcome for outcome in conformance(adapter, config, **options) if not outcome.passed]
    if failed:
        lines = [f"{outcome.model_type} ({outcome.form}): {outcome.check}: {outcome.figure}" for outcome in failed]
        raise ModelError("\n".join(lines))


def _forms(base: PreTrainedConfig, names: Sequence[str]) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield the forms for which a class has options, without duplicates."""
    values, seen = base.get_text_config().to_dict(), []
    for name in names:
        changes = {key: value for key, value in FORMS[name].items() if key in values}
        if values.get("kv_lora_rank"):
            changes.pop("num_key_value_heads", None)
        if name != BASE and all(values[key] == value for key, value in changes.items()):
            continue
        if changes not in seen:
            seen.append(changes)
            yield name, tiny_config(base, **{**_options(base), **changes})


def _options(base: PreTrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = base.get_text_config().to_dict()
    return {name: value for name, value in values.items() if name not in ("model_type", "transformers_version")}


def _check(
    adapter: ArchitectureAdapter, config: PreTrainedConfig, form: str, checks: Sequence[str]
) -> Iterator[Outcome]:
    try:
        subject = Subject(adapter, config, tiny_model(config), adapter.sites(config))
    except FlapkitError as error:
        # `auto` verifies what it derives: a form that it refuses is never pruned, and a plugin can declare it.
        refused = isinstance(adapter, Auto) and form != BASE
        yield Outcome(config.model_type, form, "sites", str(error), passed=refused, refused=refused)
        return
    for check in checks:
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                figure = CHECKS[check](subject)
            yield Outcome(config.model_type, form, check, figure)
        except (FlapkitError, RuntimeError, ValueError, IndexError, AttributeError, TypeError, KeyError) as error:
            reason = str(error) if isinstance(error, FlapkitError) else f"{type(error).__name__}: {error}"
            yield Outcome(config.model_type, form, check, reason, passed=False)


def _same(logits: Tensor, expected: Tensor, tolerance: float) -> str:
    error = float((logits - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise ModelError(f"the logits differ by {error:.0e} of the largest; {tolerance:.0e} is allowed")
    return f"{error:.0e}"


def _train(model: Any, tokens: Tensor, rate: float) -> tuple[float, float]:
    """Take ten steps of AdamW, and return the first and the last loss."""
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    if not losses[-1] < losses[0]:
        raise ModelError(f"the loss does not fall: {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses[0], losses[-1]
