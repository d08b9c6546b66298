"""Verify a declaration: a sliced model must compute the same as the masked dense model.

A wrong declaration seldom raises an error: a parameter that it misses is sliced in the wrong place, or a norm changes.
So the two models' logits are compared, on a tiny random model of the same class.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from flapkit.model.classes import dense_config
from flapkit.model.empty import ConfigKey
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.model.spread import embeddings_device, vocabulary_of
from flapkit.model.surgery import apply_plan_, check_sites, copy_sharing_weights, mask_, slice_
from flapkit.model.tiny import SIZES, doubled, tiny_config, tiny_model
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from flapkit.model.adapter import ArchitectureAdapter

TOLERANCE = 1e-5
"""Largest error due to float32, as a fraction of the largest logit."""

MIN_EFFECT = 1e-3
"""Smallest effect of masking on the logits, as the same fraction, for the comparison to be meaningful."""

IMPLEMENTATIONS = ("eager", "sdpa")

BROKEN = (RuntimeError, ValueError, IndexError, AttributeError, TypeError, KeyError)
"""What transformers' models raise where their options, or their tensors, do not fit."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of comparing a sliced with a masked model.

    Args:
        error: largest difference of a logit, as a fraction of the largest logit.
        effect: the effect of masking on the logits, as the same fraction.
        implementations: the attention implementations that were compared.
    """

    error: float
    effect: float
    implementations: tuple[str, ...]


def verify(
    model: PreTrainedModel, sites: Sequence[Site], *, tolerance: float = TOLERANCE, seed: int = 0
) -> Verification:
    """Slice and mask copies of a model by a random plan, and compare their logits.

    The input is two sequences, one of them padded on the left; as a whole, and with a step from the KV cache; with each
    attention implementation of the model.

    Args:
        model: a model in float32; it is not changed.
        sites: its sites.
        tolerance: largest error, as a fraction of the largest logit.
        seed: seed of the plan and the tokens.

    Raises:
        ModelError: a site is not exact; the message lists parameters that the declaration misses.
    """
    check_sites(model, sites)
    plan = random_plan(sites, seed)
    masked, sliced = copy.deepcopy(model), copy.deepcopy(model)
    mask_(masked, sites, plan)
    apply_plan_(sliced, sites, plan, {})
    removed = model.num_parameters() - sliced.num_parameters()
    if removed != plan.removed_params(sites):
        raise ModelError(
            f"slicing removes {removed} parameters, but the sites count {plan.removed_params(sites)} for these units"
        )
    error = effect = 0.0
    implementations = []
    current = model.config._attn_implementation
    for name in dict.fromkeys((current, *IMPLEMENTATIONS)):
        if name != current and not all(_set_attention(variant, name) for variant in (model, masked, sliced)):
            continue
        implementations.append(name)
        expected = logits_of(masked, seed)
        difference = compare(sliced, expected, seed)
        if difference is None or not difference <= tolerance:
            raise ModelError(_diagnose(model, sites, plan, seed))
        error = max(error, difference)
        effect = max(effect, float((expected - logits_of(model, seed)).abs().max() / expected.abs().max()))
    _set_attention(model, current)
    if not effect > MIN_EFFECT:
        raise ModelError(
            f"masking the consumers' inputs changes the logits by only {effect:.1e} of the largest: the declaration "
            "names the wrong consumers"
        )
    return Verification(error, effect, tuple(implementations))


def plan_without_blocks(sites: Sequence[Site]) -> PruningPlan:
    """Keep nothing of the first attention and the first MLP of each name that can go, and all of the others."""
    gone: dict[str, str] = {}
    for site in sites:
        if site.removable and sum(other.one_of == site.one_of for other in sites) > 1:
            gone.setdefault(site.block_name, site.name)
    names = set(gone.values())
    return PruningPlan({site.name: () if site.name in names else tuple(range(site.units)) for site in sites})


def verify_without_blocks(model: PreTrainedModel, sites: Sequence[Site], seed: int = 0) -> float:
    """Remove whole blocks from a copy, and compare its logits with those of a masked one, also from the KV cache.

    Args:
        model: a model in float32, with each type of layer more than once; it is not changed.
        sites: its sites.
        seed: seed of the tokens.

    Returns:
        The largest error, as a fraction of the largest logit.

    Raises:
        ModelError: it is not exact, or does not run; the message says how to declare that.
    """
    plan = plan_without_blocks(sites)
    names = [name for name, units in plan.keep.items() if not units]
    masked, sliced = copy.deepcopy(model), copy.deepcopy(model)
    mask_(masked, sites, plan)
    advice = f"without {' and '.join(names)}, {{}}; declare `removable: false` for blocks that cannot be removed whole"
    try:
        apply_plan_(sliced, sites, plan, {})
        error = float((logits_of(sliced, seed) - logits_of(masked, seed)).abs().max() / logits_of(masked).abs().max())
    except BROKEN as problem:
        raise ModelError(advice.format(f"the model does not run: {type(problem).__name__}: {problem}")) from problem
    if not error <= TOLERANCE:
        raise ModelError(advice.format(f"the logits are wrong by {error:.1e} of the largest"))
    return error


def compare(sliced: PreTrainedModel, expected: Tensor, seed: int = 0) -> float | None:
    """Return the largest error of a model's logits, as a fraction of the largest logit; None if it does not run."""
    try:
        return float((logits_of(sliced, seed) - expected).abs().max() / expected.abs().max())
    except (RuntimeError, ValueError, IndexError) as error:
        log.debug("the sliced model does not run: %s", error)
        return None


def random_plan(sites: Sequence[Site], seed: int = 0) -> PruningPlan:
    """Keep random units of every site, a different number in each layer, consistent with groups and runs."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for together in groups(sites):
        length, least = together[0].units_per_run, math.ceil(together[0].least / together[0].runs)
        count = int(torch.randint(max(least, length // 3), max(length, least + 1), (1,), generator=generator))
        for site in together:
            runs = [torch.randperm(length, generator=generator)[:count] + run * length for run in range(site.runs)]
            keep[site.name] = tuple(sorted(torch.cat(runs).tolist()))
    return PruningPlan({site.name: keep[site.name] for site in sites}).emptied(sites)


@torch.no_grad()
def logits_of(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Run two sequences, the second padded on the left, as a whole and with a step from the KV cache.

    Returns:
        Logits of all tokens but padding, [tokens, vocabulary].
    """
    tokens = torch.randint(2, vocabulary_of(model), (2, 10), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(embeddings_device(model))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    whole = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    parts = [whole[mask.bool()]]
    prefix = model(input_ids=tokens[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
    if getattr(prefix, "past_key_values", None) is not None:
        step = model(
            input_ids=tokens[:, -2:], attention_mask=mask, past_key_values=prefix.past_key_values, use_cache=True
        )
        parts.append(step.logits.flatten(0, 1))
    return torch.cat(parts).float()


def _set_attention(model: PreTrainedModel, name: str) -> bool:
    """Set the attention implementation; return whether the model has it."""
    if name == "sdpa" and not model._supports_sdpa:
        return False
    try:
        model.set_attn_implementation(name)
    except ValueError:
        return False
    return bool(model.config._attn_implementation == name)


def _diagnose(model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan, seed: int) -> str:
    """Name the first sites that are not exact when pruned alone, and parameters that the declaration may miss."""
    for together in groups(sites):
        alone = {site.name: tuple(range(site.units)) for site in sites}
        # Experts that go whole lose channels here.
        some = next(plan.keep[site.name] for site in together if plan.keep[site.name])
        of_alone = PruningPlan(alone | {site.name: plan.keep[site.name] or some for site in together}).emptied(sites)
        masked, sliced = copy.deepcopy(model), copy.deepcopy(model)
        mask_(masked, sites, of_alone)
        apply_plan_(sliced, sites, of_alone, {})
        error = compare(sliced, logits_of(masked, seed), seed)
        if error is None or not error <= TOLERANCE:
            problem = "does not run" if error is None else f"has an error of {error:.1e} of the largest logit"
            names = undeclared(model, together[0])
            hint = f"; the declaration does not name {', '.join(names[:6])}" if names else ""
            return f"{together[0].name}: the sliced model {problem}{hint}"
    return "the sliced model is exact with one site pruned, but not with several"


def undeclared(model: PreTrainedModel, site: Site) -> list[str]:
    """List the parameters of a site's module that are neither its consumer's nor coupled to its units."""
    declared = {site.weight, site.bias, *(coupling.param for coupling in site.couplings)}
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{site.path}.")]
    return [name for name in names if name not in declared]


def verify_declared(adapter: ArchitectureAdapter, config: PreTrainedConfig) -> None:
    """Verify an adapter's declaration on a tiny random model with a configuration's options; the result is cached.

    It takes about 0.1 s. If no tiny model runs with these options, the default options of the class are used.

    Args:
        adapter: says where the sites are.
        config: of the model to be pruned, which may be pruned already.

    Raises:
        ModelError: the declaration is not exact.
    """
    of: Any = type(adapter)
    _verify_declared(of, TypeAdapter(of).dump_json(adapter), ConfigKey.make(config))


@lru_cache(maxsize=16)
def _verify_declared(of: Any, options: bytes, key: ConfigKey) -> None:
    adapter, config = TypeAdapter(of).validate_json(options), key.config()
    wrong = f"the declaration of adapter {adapter.name!r} is wrong for models of type {config.model_type!r}"
    advice = "correct it (`flapkit check-adapter` lists what fails), or use `adapter: auto` without it"
    tiny = _tiny_of(config)
    try:
        verify(tiny, adapter.sites(tiny.config))
        if any(site.removable for site in adapter.sites(tiny.config)):
            deep = tiny_model(doubled(tiny.config))
            verify_without_blocks(deep, adapter.sites(deep.config))
    except BROKEN as error:
        raise ModelError(f"{wrong}: {type(error).__name__}: {error}; {advice}") from error
    except ModelError as error:
        raise ModelError(f"{wrong}: {error}; {advice}") from error


def _tiny_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the first tiny model that runs: with the configuration's options, or with its class's default ones."""
    config = dense_config(config)
    text = config.get_text_config()
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    alike = {"num_key_value_heads": 1 if kv_heads == 1 else SIZES["num_attention_heads"]}
    changes = alike if kv_heads is not None and kv_heads in (1, heads) else {}
    of, failed = config.model_type, []
    for source, changed in ((config, changes), (of, {})):
        try:
            tiny = tiny_model(tiny_config(source, **changed))
            logits_of(tiny)
        except (ModelError, *BROKEN) as error:
            failed.append(f"{type(error).__name__}: {error}")
            log.debug("no tiny model with these options: %s", error)
        else:
            return tiny
    raise ModelError(f"no declaration of {of!r} can be verified, as no tiny model runs: {failed[0]}")


def verify_loaded(model: PreTrainedModel, sites: Sequence[Site], seed: int = 0) -> Verification:
    """Slice and mask one layer of each block of a loaded model, and compare the logits on a few tokens.

    Unlike ``verify``, this checks the very model to be pruned, at its real sizes. It does not check every layer. For a
    model in half precision it checks that the difference is no more than rounding.

    Args:
        model: the model, in any data type; it is not changed.
        sites: its sites.
        seed: seed of the plan and the tokens.

    Raises:
        ModelError: the declaration does not fit the model.
    """
    check_sites(model, sites)
    chosen: dict[str, Sequence[Site]] = {}
    for together in groups(sites):
        chosen.setdefault(together[0].block_name, together)
    some = random_plan([site for together in chosen.values() for site in together], seed)
    plan = PruningPlan({site.name: some.keep.get(site.name, tuple(range(site.units))) for site in sites})
    masked = copy_sharing_weights(model, sites, own=tuple(some.keep))
    sliced = copy_sharing_weights(model, sites)
    mask_(masked, sites, plan)
    slice_(sliced, sites, plan)
    dense, expected = logits_of(model, seed), logits_of(masked, seed)
    effect = float((expected - dense).abs().mean() / expected.abs().mean())
    where = f"the declaration does not fit this model: sliced in {', '.join(some.keep)}"
    try:
        error = float((logits_of(sliced, seed) - expected).abs().mean() / expected.abs().mean())
    except (RuntimeError, ValueError, IndexError) as problem:
        raise ModelError(f"{where}, it does not run: {problem}") from problem
    allowed = TOLERANCE if model.dtype == torch.float32 else effect / 4
    if not error <= allowed or not effect > 0:
        raise ModelError(
            f"{where}, its logits differ from the masked model's by {error:.1e} of their mean absolute value "
            f"(allowed: {allowed:.1e}; effect of masking: {effect:.1e})"
        )
    return Verification(error, effect, (model.config._attn_implementation,))
