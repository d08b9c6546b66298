"""Prove a declaration: a sliced model computes what the masked dense model computes.

A declaration that is wrong seldom raises: what it forgets is cut at the wrong end, or changes a norm. So it is believed
only after the numbers agree on a tiny random model of the same class.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.model.surgery import carry_out_, check_sites, mask_, share, slice_
from flapkit.system.errors import ModelError

TOLERANCE = 1e-5
"""Largest error that float32 explains, as a fraction of the largest logit."""

MOVED = 1e-3
"""How far masking has to move the logits, as the same fraction, for the comparison to mean anything."""

IMPLEMENTATIONS = ("eager", "sdpa")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proof:
    """What the comparison of a sliced with a masked model gave.

    Args:
        error: largest difference of a logit, as a fraction of the largest logit.
        moved: how far masking itself moved the logits, as the same fraction.
        implementations: the attention implementations that were compared.
    """

    error: float
    moved: float
    implementations: tuple[str, ...]


def verify(model: PreTrainedModel, sites: Sequence[Site], *, tolerance: float = TOLERANCE, seed: int = 0) -> Proof:
    """Slice and mask copies of a model by a random plan, and compare them in every way that a model is run.

    Two sequences, one of them padded on the left; whole, and with a cached step; by each attention implementation that
    the model has.

    Args:
        model: a model in float32; it is left as it is.
        sites: its sites.
        tolerance: largest error, as a fraction of the largest logit.
        seed: of the plan and the tokens.

    Raises:
        ModelError: a site that is not exact, with what nothing in the declaration cuts.
    """
    check_sites(model, sites)
    plan = random_plan(sites, seed)
    masked, sliced = copy.deepcopy(model), copy.deepcopy(model)
    mask_(masked, sites, plan)
    carry_out_(sliced, sites, plan, {})
    removed = model.num_parameters() - sliced.num_parameters()
    if removed != plan.removed_params(sites):
        raise ModelError(f"the cut removes {removed} parameters, and the sites say {plan.removed_params(sites)}")
    error = moved = 0.0
    found = []
    current = model.config._attn_implementation
    for name in dict.fromkeys((current, *IMPLEMENTATIONS)):
        if name != current and not all(_set_attention(each, name) for each in (model, masked, sliced)):
            continue
        found.append(name)
        expected = logits_of(masked, seed)
        differs = compare(sliced, expected, seed)
        if differs is None or not differs <= tolerance:
            raise ModelError(_blame(model, sites, plan, seed))
        error = max(error, differs)
        moved = max(moved, float((expected - logits_of(model, seed)).abs().max() / expected.abs().max()))
    _set_attention(model, current)
    if not moved > MOVED:
        raise ModelError(f"masking moved the logits by {moved:.1e} of the largest alone: those are not the consumers")
    return Proof(error, moved, tuple(found))


def compare(sliced: PreTrainedModel, expected: Tensor, seed: int = 0) -> float | None:
    """Return how far a model's logits are from others, as a fraction of the largest, or None if it does not run."""
    try:
        return float((logits_of(sliced, seed) - expected).abs().max() / expected.abs().max())
    except (RuntimeError, ValueError, IndexError) as error:
        log.debug("the sliced model does not run: %s", error)
        return None


def random_plan(sites: Sequence[Site], seed: int = 0) -> PruningPlan:
    """Keep some units of every site, a different number in each layer, as the sites' groups and runs ask."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for together in groups(sites):
        length = together[0].units // together[0].runs
        count = int(torch.randint(max(1, length // 3), max(length, 2), (1,), generator=generator))
        for site in together:
            runs = [torch.randperm(length, generator=generator)[:count] + run * length for run in range(site.runs)]
            keep[site.name] = tuple(sorted(torch.cat(runs).tolist()))
    return PruningPlan({site.name: keep[site.name] for site in sites})


@torch.no_grad()
def logits_of(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Run two sequences, the second padded on the left, whole and by a cached step.

    Returns:
        Logits of the tokens that are no padding, [all tokens, vocabulary].
    """
    embeddings = next(model.get_input_embeddings().parameters())
    tokens = torch.randint(2, len(embeddings), (2, 10), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(embeddings.device)
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
    """Choose an attention implementation, where the model has it."""
    if name == "sdpa" and not model._supports_sdpa:
        return False
    try:
        model.set_attn_implementation(name)
    except ValueError:
        return False
    return bool(model.config._attn_implementation == name)


def _blame(model: PreTrainedModel, sites: Sequence[Site], plan: PruningPlan, seed: int) -> str:
    """Find the first sites that are not exact by themselves, and what of their module nothing cuts."""
    for together in groups(sites):
        alone = {site.name: tuple(range(site.units)) for site in sites}
        alone |= {site.name: plan.keep[site.name] for site in together}
        masked, sliced = copy.deepcopy(model), copy.deepcopy(model)
        mask_(masked, sites, PruningPlan(alone))
        carry_out_(sliced, sites, PruningPlan(alone), {})
        error = compare(sliced, logits_of(masked, seed), seed)
        if error is None or not error <= TOLERANCE:
            said = "does not run" if error is None else f"is off by {error:.1e} of the largest logit"
            left = uncut(model, together[0])
            hint = f"; nothing in the declaration cuts {', '.join(left[:6])}" if left else ""
            return f"{together[0].name}: the model {said} when its units are removed{hint}"
    return "the model is not exact when several sites are pruned, though each is by itself"


def uncut(model: PreTrainedModel, site: Site) -> list[str]:
    """List the parameters of a site's module that neither are its consumer's nor go with its units."""
    cut = {site.weight, site.bias, *(coupling.param for coupling in site.couplings)}
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{site.path}.")]
    return [name for name in names if name not in cut]


def verify_loaded(model: PreTrainedModel, sites: Sequence[Site], seed: int = 0) -> Proof:
    """Slice and mask one layer's share of each block of a loaded model, and compare them on a few tokens.

    This proves that the declaration fits this very model at its real sizes: the tiny models of ``verify`` have others.
    It does not prove every layer; of a model in half precision it proves that the difference is no more than rounding.

    Args:
        model: the model, in any type; it is left as it is.
        sites: its sites.
        seed: of the plan and the tokens.

    Raises:
        ModelError: the declaration does not hold for the model.
    """
    check_sites(model, sites)
    chosen: dict[str, Sequence[Site]] = {}
    for together in groups(sites):
        first = together[0]
        chosen.setdefault(first.block.name if first.block else first.kind, together)
    some = random_plan([site for together in chosen.values() for site in together], seed)
    plan = PruningPlan({site.name: some.keep.get(site.name, tuple(range(site.units))) for site in sites})
    masked, sliced = share(model, sites, own=tuple(some.keep)), share(model, sites)
    mask_(masked, sites, plan)
    slice_(sliced, sites, plan)
    dense, expected = logits_of(model, seed), logits_of(masked, seed)
    moved = float((expected - dense).abs().mean() / expected.abs().mean())
    where = f"the declaration does not hold for this model: sliced in {', '.join(some.keep)}"
    try:
        error = float((logits_of(sliced, seed) - expected).abs().mean() / expected.abs().mean())
    except (RuntimeError, ValueError, IndexError) as problem:
        raise ModelError(f"{where}, it does not run: {problem}") from problem
    allowed = TOLERANCE if model.dtype == torch.float32 else moved / 4
    if not error <= allowed or not moved > 0:
        raise ModelError(
            f"{where}, its logits are off by {error:.1e} of their mean size from those of the masked model; "
            f"{allowed:.1e} is allowed, where masking moves them by {moved:.1e}"
        )
    return Proof(error, moved, (model.config._attn_implementation,))
