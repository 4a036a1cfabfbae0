"""Claims of ILM: planning on star graphs, and infilling of code where the number of missing tokens is unknown.

`--quick` is quick once the models of the star graphs are in the user's cache.
"""

from __future__ import annotations

from typing import Any

import torch

from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.diffusion import loaded
from pertoken.bench.insertion import MODEL, Solved, completeness, fillers, graphs, holes, ranks, solve, stops_at
from pertoken.core.estimates import roc_area
from pertoken.denoise.ilm import ILM
from pertoken.denoise.insertion import Request, Slots, SlotsModel
from pertoken.denoise.loop import Denoise

PLANNER = ILM(threshold=0.5, choice="two_stage")
ONE_BY_ONE, AT_ONCE = Denoise(block=None), Denoise(block=None, steps=2)


def against(bench: Bench, mine: Solved, name: str, other: Solved) -> Measurement:
    detail = {
        label: {"edges": one.edges, "forwards per graph": one.steps} for label, one in (("ilm", mine), (name, other))
    }
    return Measurement(mine.exact, name, other.exact, len(graphs(bench).ids), detail)


@claim(
    "ilm",
    claim="On asymmetric star graphs ILM finds more than 90 % of the paths",
    metric="share of paths right as a whole",
    expected="> 0.9",
    compare="value",
    shown=True,
)
def plans(bench: Bench) -> Measurement:
    return against(bench, solve(bench, "insertion", PLANNER), "left to right", solve(bench, "autoregressive"))


@claim(
    "ilm",
    claim="On asymmetric star graphs ILM finds more paths than a left-to-right model of its size and training",
    metric="share of paths right as a whole",
    expected="> 1",
)
def beats_left_to_right(bench: Bench) -> Measurement:
    return plans(bench)


@claim(
    "ilm",
    claim="On asymmetric star graphs ILM finds more paths than masked diffusion that fills several places per step",
    metric="share of paths right as a whole",
    expected="> 1",
)
def beats_parallel_diffusion(bench: Bench) -> Measurement:
    mine = solve(bench, "insertion", PLANNER)
    return against(bench, mine, "masked diffusion, 2 steps", solve(bench, "masked", AT_ONCE))


@claim(
    "ilm",
    claim="On asymmetric star graphs ILM finds more paths than masked diffusion that fills one place per step",
    metric="share of paths right as a whole",
    expected="> 1",
)
def beats_sequential_diffusion(bench: Bench) -> Measurement:
    mine = solve(bench, "insertion", PLANNER)
    return against(bench, mine, "masked diffusion, one per step", solve(bench, "masked", ONE_BY_ONE))


@claim(
    "ilm",
    claim="Masked diffusion comes nearer to ILM on star graphs when it fills one place per step",
    metric="paths that masked diffusion misses and ILM finds, as a share of all",
    expected="< 1",
)
def gap_shrinks(bench: Bench) -> Measurement:
    mine = solve(bench, "insertion", PLANNER).exact
    slow, fast = (mine - solve(bench, "masked", rule).exact for rule in (ONE_BY_ONE, AT_ONCE))
    return Measurement(slow, "several places per step", fast, len(graphs(bench).ids))


@claim(
    "ilm",
    claim="On star graphs ILM finds more paths where its outputs choose the gap than where chance does",
    metric="share of paths right as a whole",
    expected="> 1",
)
def beats_random_gaps(bench: Bench) -> Measurement:
    def chance() -> Solved:
        torch.manual_seed(bench.seed)
        return solve(bench, "insertion", ILM(threshold=0.5, choice="random"))

    return against(bench, solve(bench, "insertion", PLANNER), "random gaps", chance())


@claim(
    "ilm",
    claim="On star graphs ILM with several insertions per step needs fewer forwards for 98 % as many paths",
    metric="share of paths right as a whole",
    expected=">= 0.98",
)
def parallel_keeps_up(bench: Bench) -> Measurement:
    fast = solve(bench, "insertion", ILM(threshold=0.5, choice="two_stage", parallel=0.9))
    one = solve(bench, "insertion", PLANNER)
    if fast.steps >= one.steps:
        detail = {"forwards per graph": [fast.steps, one.steps]}
        return Measurement(0.0, "one per step", one.exact, len(graphs(bench).ids), detail)
    return against(bench, fast, "one per step", one)


@claim(
    "ilm",
    claim="On star graphs ILM writes the goal before the node after the fork, the choice that depends on it",
    metric="mean step of insertion",
    expected="< 1",
)
def goal_before_fork(bench: Bench) -> Measurement:
    asked, found = graphs(bench), solve(bench, "insertion", PLANNER)
    assert found.trace is not None
    goals, forks = [], []
    for row, (answer, steps) in enumerate(zip(asked.answers, ranks(found.trace, len(asked.ids)), strict=True)):
        prompt = asked.ids[row, asked.valid[row] & ~asked.answer[row]].tolist()
        sources = prompt[1:-3:2]
        fork = next(node for node in sources if sources.count(node) > 1)
        if len(steps) == len(answer):
            goals.append(steps[-1])
            forks.append(steps[answer.index(fork) + 1])
    mean = lambda values: sum(values) / max(len(values), 1)  # noqa: E731
    return Measurement(mean(goals), "the node after the fork", mean(forks), len(goals))


def infilling(bench: Bench, baseline: str, metric: str) -> Measurement:
    torch.manual_seed(bench.seed)
    found = fillers(bench)
    detail: dict[str, Any] = {name: {"right": one.right, "length": one.length} for name, one in found.items()}
    detail["right lengths on training texts by P(stop)"] = stops_at(bench)[1]
    mine, other = getattr(found["ilm"], metric), getattr(found[baseline], metric)
    return Measurement(mine, baseline, other, len(holes(bench)), detail)


@claim(
    "ilm",
    claim="The stop head of the code model, read at the open slots, tells holes that lack nothing from others better "
    "than a linear probe of the first token's state, where the paper reads it",
    metric="area under the ROC curve, half of the holes lack tokens",
    expected="> 1",
)
def stop_head(bench: Bench) -> Measurement:
    _, states, whole = completeness(bench, "train", 1024)
    chances, other, truth = completeness(bench, "heldout", 256)
    mean, spread = states.mean(0), states.std(0) + 1e-6
    states, other = (states - mean) / spread, (other - mean) / spread
    ridge = states.T @ states + len(states) * torch.eye(states.shape[1])
    probe = torch.linalg.solve(ridge, states.T @ (whole.float() - 0.5))
    return Measurement(
        roc_area(chances, truth), "first token", roc_area(other @ probe, truth), len(truth), {"fitted on": len(states)}
    )


@claim(
    "ilm",
    claim="ILM gives holes of unknown size in code their length more often than masked diffusion guesses it",
    metric="share of holes with the right number of tokens",
    expected="> 1",
    shown=True,
)
def right_length(bench: Bench) -> Measurement:
    return infilling(bench, "masked diffusion, own guess", "length")


@claim(
    "ilm",
    claim="ILM fills more holes of unknown size in code exactly than masked diffusion that guesses the size",
    metric="share of holes filled as they were",
    expected="> 1",
)
def fills_more_than_diffusion(bench: Bench) -> Measurement:
    return infilling(bench, "masked diffusion, own guess", "right")


@claim(
    "ilm",
    claim="ILM fills more holes of unknown size in code exactly than a left-to-right model, cut to fit",
    metric="share of holes filled as they were",
    expected="> 1",
)
def fills_more_than_left_to_right(bench: Bench) -> Measurement:
    return infilling(bench, "left to right", "right")


@claim(
    "ilm",
    claim="ILM fills more holes of unknown size in code exactly where its outputs choose the places",
    metric="share of holes filled as they were",
    expected="> 1",
)
def fills_more_than_random(bench: Bench) -> Measurement:
    return infilling(bench, "random gaps", "right")


@claim(
    "ilm",
    claim="The outputs for tokens stored in the order of insertion are those of the same text in order",
    metric="largest difference of scores over their largest size",
    expected="<= 1e-4",
    compare="value",
)
def order_of_storage(bench: Bench) -> Measurement:
    model, generator = loaded(bench, name=MODEL).model, torch.Generator().manual_seed(bench.seed)
    ids = torch.randint(1, 4000, (4, 33), generator=generator)
    ids[:, 20] = model.config.mask_token_id
    model.generation_config.max_new_tokens = 32
    slots = Slots.of(request := Request.of(model, ids, None, model.generation_config, None))
    scorer, worst = SlotsModel(request), 0.0
    for _ in range(32):
        chosen = torch.zeros_like(slots.open)
        row = torch.arange(4)
        chosen[row, (torch.rand(4, generator=generator) * slots.count).long()] = True
        slots.insert(chosen, torch.randint(1, 4000, chosen.shape, generator=generator))
    with torch.inference_mode():
        scores, _ = scorer.forward(slots)
        stored = torch.cat([slots.given, slots.ids[:, : slots.width]], 1)
        places = torch.cat([slots.given_positions, slots.open_positions], 1)
        keep = torch.cat([slots.given_valid, slots.open], 1)
        order = places.masked_fill(~keep, 10**6).argsort(-1)[:, : int(keep.sum(-1)[0])]
        plain = model(stored.gather(1, order), attention_mask=torch.ones_like(order), use_cache=False).logits.float()
    wanted = plain.gather(1, slots.open_positions[..., None].expand(-1, -1, plain.shape[-1]))
    finite = scores.isfinite()
    worst = float((scores - wanted)[finite].abs().max() / wanted.abs().max())
    return Measurement(worst, "in order", 0.0, int(finite.sum()))
