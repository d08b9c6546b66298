"""The structure that a plan leaves: what each layer keeps of its heads and its MLP width."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from flapkit.plan import PruningPlan
from flapkit.sites import Site

KINDS = {"attention": "attention heads kept (KV groups)", "mlp": "MLP channels kept"}


def draw_structure(sites: Sequence[Site], plan: PruningPlan, title: str) -> bytes:
    """Draw the share of units that each layer keeps, a panel for attention and one for MLPs.

    Args:
        sites: the dense model's sites.
        plan: the units kept.
        title: what stands above.

    Returns:
        The picture as PNG.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (kind, label) in zip(figure.subplots(1, 2, sharey=True), KINDS.items(), strict=True):
        of_kind = [site for site in sites if site.kind == kind]
        layers = [site.layer for site in of_kind]
        kept = [100 * len(plan.keep[site.name]) / site.units for site in of_kind]
        axes.bar(layers, [100.0] * len(layers), color="#e4e4e4", label="removed")
        bars = axes.bar(layers, kept, color="#3566a8", label="kept")
        if len(layers) <= 12:
            counts = [str(len(plan.keep[site.name])) for site in of_kind]
            axes.bar_label(bars, counts, label_type="center", color="white")
        axes.set(xlabel="layer", ylabel="%" if kind == "attention" else "", title=label, ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
