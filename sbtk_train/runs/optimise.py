"""The optimiser of a recipe, its rates over a run, and the average of the student's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbtk_train.recipes import Recipe
from sbtk_train.students.student import Student


def build_optimizer(student: Student, recipe: Recipe) -> torch.optim.Optimizer:
    """Returns the recipe's optimiser; each group carries the `factor` of its rate."""
    trunk = [p for p in student.trunk.parameters() if p.requires_grad]
    heads = [
        parameter
        for name, parameter in student.named_parameters()
        if not name.startswith("trunk.") and parameter.requires_grad
    ]
    groups = [
        {"params": [p for p in trunk if p.dim() > 1], "factor": 1.0},
        {"params": heads, "factor": recipe.head_rate_factor},
    ]
    norms = [p for p in trunk if p.dim() == 1]
    if recipe.optimizer == "sgd":
        groups[0]["params"] = trunk
        groups = [group for group in groups if group["params"]]
        return torch.optim.SGD(
            groups, recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    if recipe.optimizer == "adam":
        groups[0]["params"] = trunk
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)
    groups.append({"params": norms, "factor": 1.0, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, recipe.learning_rate, weight_decay=recipe.weight_decay)


def set_rates(
    optimizer: torch.optim.Optimizer, recipe: Recipe, *, epoch: int, updates: int, epoch_steps: int
) -> None:
    """Sets the learning rates for the update after `updates` others, in `epoch` (from 0)."""
    if recipe.schedule == "step":
        rate = recipe.learning_rate * 0.1 ** (epoch // recipe.step_epochs)
    elif recipe.schedule == "exponential":
        rate = recipe.learning_rate * 0.001 ** (epoch / recipe.epochs)
    else:
        progress = updates / (epoch_steps * recipe.epochs)
        rate = recipe.learning_rate * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, progress))))
    if updates < recipe.warmup_steps:
        rate *= (updates + 1) / recipe.warmup_steps
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


@torch.no_grad()
def update_average(average: Student, student: Student, decay: float, updates: int) -> None:
    """Moves the averaged student towards the student after its `updates`-th update."""
    # Young averages follow closely, or they would remember the initialisation.
    share = 1 - min(decay, (1 + updates) / (10 + updates))
    for kept, new in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
        if kept.dtype.is_floating_point:
            kept.lerp_(new, share)
        else:
            kept.copy_(new)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimiser's state by `<parameter>.<name>`."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
