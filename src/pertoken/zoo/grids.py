"""Grids that learn to classify: first the diagonal, then all paths, then with a router that is held to a budget.

The first run (`routes` "diagonal") trains the PVTv2 on a grid's diagonal, which is cheap; the second begins with its
stages in every column and opens all edges. The third goes on with "dit", whose gates learn from the loss and from the
paper's term for the budget, or for the controls with "static" or "random" at the same cost. For "dit" mu falls from the
whole grid's cost to the recipe's in the first 40 % of the steps; in the last 40 % there is no noise, so that the budget
is met by the decisions of a trained grid. The random one goes on from the routed model, whose shares of tokens it has
at every edge, all multiplied by one number where they would cost more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PvtV2Config

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.trace import Trace
from pertoken.depth.dit_routing import DiTRouting, budget_loss
from pertoken.depth.random_routing import RandomRouting
from pertoken.depth.routing import Rates, Routing, keep_rates
from pertoken.depth.static_routing import StaticRouting
from pertoken.models.grid import GridClassifier, GridConfig
from pertoken.zoo.scene_recipe import SceneRecipe

WARM, SURE = 0.4, 0.6  # shares of the steps: in the first mu falls, from the second on gates learn without noise
COLUMNS, ROWS = 4, 3


def made(recipe: SceneRecipe, classes: tuple[str, ...]) -> GridClassifier:
    """An untrained grid of a recipe: maps of a quarter, an eighth and a sixteenth of the image's size."""
    base = PvtV2Config(
        image_size=recipe.size,
        num_encoder_blocks=ROWS,
        depths=(1,) * ROWS,
        sr_ratios=(4, 2, 1),
        hidden_sizes=tuple(recipe.width * (row + 1) for row in range(ROWS)),
        patch_sizes=(7, 3, 3),
        strides=(4, 2, 2),
        num_attention_heads=(1, 2, 3),
        mlp_ratios=(4, 4, 4),
    )
    return GridClassifier(GridConfig(base, COLUMNS, id2label=dict(enumerate(classes))))


def router(recipe: SceneRecipe, model: GridClassifier, pixels: Tensor) -> Routing | None:
    """What is attached while training, and when the model is used as it was trained. pixels: pictures on which a random
    router's rates are measured, if the model does not know them yet."""
    if recipe.routes == "dit":
        return DiTRouting()
    if recipe.routes == "diagonal":
        return StaticRouting(edges=model.config.diagonal())
    if recipe.routes == "static":
        return StaticRouting(Budget(fraction=recipe.mu / model.whole))
    if recipe.routes == "random":
        if getattr(model.config, "rates", None) is None:
            trace = Trace()
            with torch.no_grad(), attach(model.eval(), DiTRouting(), trace=trace):
                model(pixels)
            model.config.rates = keep_rates(trace)
        rates = tuple((int(i), int(j), float(through), float(down)) for i, j, through, down in model.config.rates)
        return RandomRouting(Budget(fraction=random_share(model, rates, recipe.mu)), rates)
    return None


def phases(recipe: SceneRecipe, policy: Routing | None, stop: int) -> list[tuple[int, Routing | None]]:
    """What is attached up to which step, in a training that goes up to step `stop`."""
    if not isinstance(policy, DiTRouting):
        return [(stop, policy)]
    return [(min(round(SURE * recipe.steps), stop), policy), (stop, replace(policy, noise=0.0))]


def spread(model: GridClassifier) -> None:
    """Every stage and patch embedding of a row becomes that of the diagonal."""
    for i, j, kind in model.config.edges():
        edges, first = (model.stages, i) if kind == "transform" else (model.downs, i + 1)
        edges[f"{i}_{j}"].load_state_dict(edges[f"{i}_{first}"].state_dict())


def random_share(model: GridClassifier, rates: Rates, mu: float, seed: int = 0, steps: int = 10) -> float:
    """By what to multiply rates for random routing to cost `mu` at most, which depends on no image."""
    config, low, high = model.config, 0.0, 1.0
    blank = torch.zeros(1, config.base_config.num_channels, *config.image_size, dtype=model.dtype)
    for step in range(steps):
        middle = (low + high) / 2 if step else 1.0
        with torch.no_grad(), attach(model.eval(), RandomRouting(Budget(fraction=middle), rates, seed)):
            spent = float(model(blank).spent)
        low, high = (low, middle) if spent > mu else (middle, high)
    return low


def loss(model: GridClassifier, recipe: SceneRecipe, pixels: Tensor, classes: Tensor, step: int) -> Tensor:
    """Of a batch at `step`, with whatever is attached."""
    torch.manual_seed(recipe.seed + step)  # of the gates' noise
    out = model(pixels, labels=classes)
    if recipe.routes != "dit":
        return out.loss
    left = max(1 - step / (WARM * recipe.steps), 0.0)
    return out.loss + budget_loss(out.spent, recipe.mu + left * (model.whole - recipe.mu), recipe.penalty)
