"""Store a pruning in Lightning's checkpoints, and repeat it on a dense model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flapkit.model.classes import reshape_
from flapkit.model.history import plan_of, set_plan_
from flapkit.model.plan import PruningPlan
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "flapkit.FlapPruning"
"""The key of the state among those of a checkpoint's callbacks."""


def state_of(model: PreTrainedModel, plan: PruningPlan) -> dict[str, str]:
    """Return how a model was pruned, as JSON texts.

    Args:
        model: the pruned model.
        plan: the applied plan.
    """
    carried = plan_of(model) or plan
    return {"config": json.dumps(model.config.to_dict()), "plan": plan.to_json(), "carried": carried.to_json()}


def restore_pruning_(model: PreTrainedModel, checkpoint: Mapping[str, Any]) -> PruningPlan:
    """Slice a model to the sizes of the one in a Lightning checkpoint, so that its weights can be loaded.

    Call it in your LightningModule, so that ``load_from_checkpoint`` works with the dense model:

    ```python
    def on_load_checkpoint(self, checkpoint):
        flapkit.restore_pruning_(self.model, checkpoint)
    ```

    Args:
        model: the model before it was pruned; one that has the pruned sizes already is not changed.
        checkpoint: a checkpoint of a training with the callback ``FlapPruning``.

    Returns:
        The applied plan.

    Raises:
        ModelError: the checkpoint has no plan, or belongs to another model.
    """
    state = checkpoint.get("callbacks", {}).get(KEY)
    if state is None:
        raise ModelError(
            "this checkpoint contains no plan: the model was trained without FlapPruning, or "
            "ModelCheckpoint(save_weights_only=True) left the plan out"
        )
    reshape_(model, json.loads(state["config"]))
    set_plan_(model, PruningPlan.from_json(state["carried"]))
    return PruningPlan.from_json(state["plan"])
