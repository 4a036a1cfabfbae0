"""Routing through a grid: its definition, its laws, its gates and its costs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from transformers import PvtV2ForImageClassification

from pertoken.core.attach import active, attach
from pertoken.core.budget import Budget
from pertoken.core.card import card, cards
from pertoken.core.cost import count_flops
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace
from pertoken.depth.dit_routing import DiTRouting, budget_loss, cutoff_for
from pertoken.depth.random_routing import RandomRouting
from pertoken.depth.routing import keep_rates, straight_through
from pertoken.depth.static_routing import StaticRouting, affordable
from pertoken.methods import load_methods
from pertoken.models.edges import Map
from pertoken.models.grid import GridClassifier, GridConfig, costs, grid_of
from pertoken.zoo.grids import phases
from pertoken.zoo.scenes_models import SCENE_RECIPES
from tests.depth.grids import base, grid, images, naive

load_methods()

ROUTERS = [name for name, one in cards().items() if "grid" in one.needs]
POLICIES = (
    DiTRouting(),
    DiTRouting(Budget(fraction=0.5)),
    DiTRouting(cutoff=1.5),
    RandomRouting(Budget(fraction=0.4), seed=2),
    StaticRouting(Budget(fraction=0.5)),
)


@pytest.fixture(params=ROUTERS)
def policy(request):
    build = card(request.param).build
    return build(**build.small)


def routed(model, pixels, policy=None):
    """What images spend."""
    with torch.no_grad(), attach(model, policy or DiTRouting()):
        return model(pixels).spent


def seen(model, pixels, policy, **options):
    with torch.no_grad(), attach(model, policy, **options):
        return model(pixels).logits


@pytest.mark.parametrize("settings", [{}, {"linear_attention": True}], ids=["reduced", "pooled"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_is_the_update_of_each_token(policy, settings):
    model = grid(**settings)
    for number, pixels in enumerate(images(2).split(1)):
        trace = Trace()
        found = seen(model, pixels, policy, trace=trace)
        with torch.no_grad():
            expected = naive(model, pixels, trace)
        assert torch.allclose(found[0], expected, atol=1e-4), number


def test_a_row_that_no_token_reaches_is_left_out_of_the_mean():
    model, policy = grid(), StaticRouting(edges=((0, 0, "transform"), (0, 1, "down")))
    trace, pixels = Trace(), images(1)
    found = seen(model, pixels, policy, trace=trace)
    with torch.no_grad():
        assert torch.allclose(found[0], naive(model, pixels, trace), atol=1e-4)


def test_full_budget_is_the_identity(policy):
    model, pixels = grid(), images()
    with torch.no_grad():
        expected = model(pixels).logits
    full = dataclasses.replace(policy, budget=Budget.full())
    assert torch.equal(seen(model, pixels, full), expected)
    trace = Trace()
    assert torch.equal(seen(model, pixels, full, trace=trace), expected) and len(trace.steps) == 9
    assert not torch.allclose(seen(model, pixels, policy), expected)


def test_undo_is_exact_and_disabled_is_the_model(policy):
    model, pixels = grid(), images(2)
    before = fingerprint(model, deep=True)
    with torch.no_grad():
        expected = model(pixels).logits
        with attach(model, policy) as attached:
            assert not torch.allclose(model(pixels).logits, expected)
            with attached.disabled():
                assert torch.equal(model(pixels).logits, expected)
        with pytest.raises(RuntimeError, match="inside"), attach(model, policy):
            raise RuntimeError("inside")
        assert fingerprint(model, deep=True) == before and not active(model)
        assert torch.equal(model(pixels).logits, expected)


@pytest.mark.parametrize("settings", [{}, {"linear_attention": True}], ids=["reduced", "pooled"])
def test_a_batch_is_each_image_alone_and_in_any_order(policy, settings):
    model, pixels, trace = grid(**settings), images(5), Trace()
    together = seen(model, pixels, policy, trace=trace)
    if "gates" in policy.reads:
        assert any(len({tuple(row) for row in s.decision.layers[..., 0].tolist()}) > 1 for s in trace.steps)
        assert any(len(set(s.decision.layers[..., 0].sum(-1).tolist())) > 1 for s in trace.steps)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(seen(model, pixels[order], policy), together[order], atol=1e-4)
    for row in range(5):
        assert torch.allclose(seen(model, pixels[row : row + 1], policy)[0], together[row], atol=1e-4)


def test_replay_serves_the_recording(policy, tmp_path):
    model, recorded, again = grid(), Trace(), Trace()
    first = seen(model, images(), policy, trace=recorded)
    recorded.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace")
    other = dataclasses.replace(policy, budget=Budget.full())
    assert torch.equal(seen(model, images(), other, trace=again, replay=loaded), first)
    assert again.same_as(recorded)
    with pytest.raises(BadRequest, match="replay with the model and the images"):
        seen(model, images(size=32), policy, replay=loaded)


def test_cost_falls_as_the_budget_says(policy):
    model, pixels = grid(), images()
    found = []
    for share in (1.0, 0.7, 0.4, 0.2):
        one = dataclasses.replace(policy, budget=Budget(fraction=share))
        found.append(count_flops(lambda one=one: seen(model, pixels, one)))
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


@pytest.mark.parametrize("settings", [{}, {"linear_attention": True}], ids=["reduced", "pooled"])
def test_what_is_spent_is_what_is_computed(settings):
    """The table of costs against the operations that torch counts."""
    model, pixels = grid(**settings), images(3)
    table = costs(model.config.base_config, 24, 24)

    def counted(edges):
        spent = []
        with torch.no_grad(), attach(model, StaticRouting(edges=edges)):
            flops = count_flops(lambda: spent.append(model(pixels).spent))
        return flops, spent[0]

    nothing, none_spent = counted(())
    assert none_spent.eq(0).all()
    for edges in (model.config.diagonal(), model.config.edges(), model.config.edges()[:7]):
        flops, spent = counted(edges)
        assert flops - nothing == 2 * 3 * table.of(edges)
        assert torch.allclose(spent, torch.full((3,), table.of(edges) / table.of(model.config.diagonal())))
    assert model.whole == pytest.approx(table.of(model.config.edges()) / table.of(model.config.diagonal()))


def test_tokens_that_are_not_transformed_cost_nothing_of_the_stage():
    """Of two sets of decisions, the operations differ by what the table says of a token, and by no more."""
    model, pixels = grid(), images(3)
    table = costs(model.config.base_config, 24, 24)
    found = []
    for count in (10, 20):
        rates = ((0, 0, count / 36, 0.0),)
        with torch.no_grad(), attach(model, RandomRouting(Budget(fraction=1.0), rates)):
            found.append(count_flops(lambda: model(pixels)))
    assert found[1] - found[0] == 2 * 3 * 10 * table.token[0]


def test_an_edge_that_no_token_takes_is_not_run():
    model, calls = grid(), []
    for name, stage in model.stages.items():
        stage.blocks[0].attention.query.register_forward_hook(
            lambda m, given, out, name=name: calls.append((name, len(given[0])))
        )
    rates = ((0, 0, 1.0, 0.0), (0, 2, 0.5, 0.0))
    seen(model, images(2), RandomRouting(Budget(fraction=1.0), rates))
    assert [name for name, _ in calls] == ["0_0", "0_2"] and calls[1][1] == 36


def test_the_diagonal_is_the_model_that_the_grid_is_made_of():
    torch.manual_seed(1)
    for settings in ({}, {"linear_attention": True}, {"depths": (2, 1, 3)}):
        model = PvtV2ForImageClassification(base(**settings)).eval()
        made = grid_of(model, pooled="deepest")
        assert made.config.columns == 4 and not made.training
        with torch.no_grad():
            expected = model(images()).logits
        assert torch.allclose(seen(made, images(), StaticRouting(edges=made.config.diagonal())), expected, atol=1e-4)
        share = Budget(fraction=1.0001 / made.whole)
        assert affordable(made.config, share) == made.config.diagonal()
        assert torch.allclose(seen(made, images(), StaticRouting(share)), expected, atol=1e-4)


def test_training_runs_what_a_recording_of_it_gives():
    """What is multiplied by decisions is what is gathered by them."""
    model, trace, pixels = grid().train(), Trace(), images()
    with attach(model, DiTRouting(), trace=trace, training=True):
        out = model(pixels)
    model.eval()
    with torch.no_grad(), attach(model, DiTRouting(), replay=trace):
        again = model(pixels)
    assert torch.allclose(out.logits, again.logits, atol=1e-4) and torch.allclose(out.spent, again.spent, atol=1e-5)
    noise = Trace()
    with attach(model.train(), DiTRouting(), trace=noise, training=True):
        model(pixels)
    assert not noise.same_as(trace)


def test_without_noise_gates_learn_with_the_decisions_that_they_make_afterwards():
    model, trace = grid().train(), Trace()
    with attach(model, DiTRouting(noise=0.0), trace=trace, training=True):
        model(images())
    after = Trace()
    seen(model.eval(), images(), DiTRouting(), trace=after)
    assert after.same_as(trace)
    with pytest.raises(BadRequest, match=r"noise=-1\.0 must be 0 or above"):
        DiTRouting(noise=-1.0)
    recipe = SCENE_RECIPES["scenes-grid-routed"]
    noisy, sure = phases(recipe, DiTRouting(), recipe.steps)
    assert (noisy[0], noisy[1].noise) == (540, 1.0) and (sure[0], sure[1].noise) == (900, 0.0)
    assert phases(recipe, DiTRouting(), 100)[0][0] == 100 and phases(recipe, None, 7) == [(7, None)]


def test_gates_learn_from_the_loss_and_from_the_budget():
    torch.manual_seed(0)
    model, pixels, labels = grid().train(), images(), torch.tensor([0, 1, 2, 3])
    for term in ("task", "budget"):
        model.zero_grad()
        with attach(model, DiTRouting(), training=True):
            out = model(pixels, labels=labels)
            (out.loss if term == "task" else budget_loss(out.spent, 0.5)).backward()
        for name, gate in model.gates.named_parameters():
            assert gate.grad is not None and gate.grad.isfinite().all() and gate.grad.abs().sum() > 0, (term, name)
    spent = [float(routed(model.eval(), pixels).mean())]
    for mu in (0.5, model.whole):
        optimizer = torch.optim.Adam(model.gates.parameters(), lr=0.2)
        for _ in range(25):
            with attach(model.train(), DiTRouting(), training=True):
                optimizer.zero_grad()
                budget_loss(model(pixels).spent, mu).backward()
                optimizer.step()
        spent.append(float(routed(model.eval(), pixels).mean()))
    assert spent[1] < spent[0] - 0.5 and spent[2] > spent[1] + 0.3


@pytest.mark.parametrize("ema", [0.9, 0.5, None])
def test_gates_use_the_moving_average_of_their_weights(ema):
    gate = grid(ema=ema).gates["0_1"]["down"].train()
    mean, normed = gate.weight.detach().clone(), torch.nn.functional.layer_norm(images(2, 8)[:, 0], (8,))
    for _ in range(3):
        gate.weight.data.add_(0.5)
        mean = gate.weight.detach().clone() if ema is None else ema * mean + (1 - ema) * gate.weight.detach()
        out = gate(normed)
        assert torch.allclose(out, normed @ mean.T + gate.bias, atol=1e-5)
        out[..., 0].sum().backward()
        assert torch.allclose(gate.weight.grad[0], normed.sum((0, 1)), atol=1e-4)
        gate.zero_grad()
    assert torch.allclose(gate.eval()(normed), out, atol=1e-6)


def test_untrained_gates_are_open():
    torch.manual_seed(0)
    model = GridClassifier(GridConfig(base(), num_labels=5)).eval()
    with torch.no_grad():
        expected = model(images())
    with torch.no_grad(), attach(model, DiTRouting()):
        out = model(images())
    assert torch.allclose(out.logits, expected.logits, atol=1e-5) and torch.allclose(out.spent, expected.spent)


def test_a_cutoff_meets_a_budget():
    model, batches = grid(), [images(8, seed=1), images(8, seed=2)]
    spent = []
    for mu in (0.6, 1.2, 1.8):
        cutoff = cutoff_for(model, batches, mu)
        with torch.no_grad(), attach(model, DiTRouting(cutoff=cutoff)):
            spent.append(float(torch.cat([model(x).spent for x in batches]).mean()))
        assert abs(spent[-1] - mu) < 0.1
    with pytest.raises(BadRequest, match="mu=9 is outside"):
        cutoff_for(model, batches, 9)
    with pytest.raises(BadRequest, match="at least one"):
        cutoff_for(model, [], 1.0)


def test_budgets_cap_every_node_and_nest():
    model, found = grid(), []
    for share in (0.3, 0.6, 1.0):
        trace = Trace()
        seen(model, images(), DiTRouting(Budget(fraction=share)), trace=trace)
        for step in trace.steps:
            assert (step.decision.layers.sum(1) <= share * step.decision.valid.sum(-1, keepdim=True) + 1e-4).all()
        found.append(trace.steps[0].decision.layers)
    assert (found[0] <= found[1]).all() and (found[1] <= found[2]).all() and not torch.equal(found[0], found[2])


def test_random_routing_keeps_the_rates_it_is_given():
    model, trace, other = grid(), Trace(), Trace()
    seen(model, images(16), DiTRouting(), trace=trace)
    rates = keep_rates(trace)
    assert len(rates) == 9 and all(0 <= share <= 1 for _, _, *shares in rates for share in shares)
    seen(model, images(16), RandomRouting(Budget(fraction=1.0), rates, seed=1), trace=other)
    for step, (row, column, through, _) in zip(other.steps, rates, strict=True):
        assert step.site.endswith(f".{row}.{column}")
        there = step.decision.valid.sum(-1)
        assert ((step.decision.layers[..., 0].sum(-1) - there * through).abs() <= 0.5 + 1e-4).all()
    assert not torch.equal(other.steps[0].decision.layers, trace.steps[0].decision.layers)


def test_static_edges_are_what_the_budget_pays_and_can_be_reached():
    config = GridConfig(base(), 5)
    table, before = costs(config.base_config, 24, 24), ()
    whole = table.of(config.edges())
    for share in (0.0, 0.05, 0.2, 0.5, 0.8, 1.0):
        edges = affordable(config, Budget(fraction=share))
        assert table.of(edges) <= share * whole * (1 + 1e-6) and len(set(edges)) == len(edges)
        for row, column, _ in edges:
            assert row == 0 or any(r == row - 1 and c <= column and kind == "down" for r, c, kind in edges)
        assert len(edges) >= len(before)
        before = edges
    assert set(before) == set(config.edges())


def test_a_saved_grid_is_loaded_again_and_half_precision_runs(tmp_path, policy):
    model = grid(pooled="deepest")
    model.save_pretrained(tmp_path)
    loaded = GridClassifier.from_pretrained(tmp_path).eval()
    assert tuple(loaded.config.base_config.hidden_sizes) == (8, 12, 16)
    assert torch.equal(seen(loaded, images(), policy), seen(model, images(), policy))
    low = seen(loaded.to(torch.bfloat16), images().bfloat16(), policy)
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_feature_maps_are_the_rows_of_the_last_column():
    model = grid()
    with torch.no_grad(), attach(model, DiTRouting()):
        maps = model.feature_maps(images(2, 36))
    assert [tuple(one.shape) for one in maps] == [(2, 8, 9, 9), (2, 12, 5, 5), (2, 16, 3, 3)]


def test_bad_input_is_refused():
    model = grid()
    with pytest.raises(BadRequest, match="7 x 7 pixels are too small: row 0"):
        model(images(1, 7))
    with pytest.raises(BadRequest, match="columns=2 do not reach row 2"):
        GridConfig(base(), 2)
    with pytest.raises(BadRequest, match="pooled='mean' is unknown"):
        GridConfig(base(), pooled="mean")
    with pytest.raises(BadRequest, match="ema=1 is outside"):
        GridConfig(base(), ema=1)
    with pytest.raises(BadRequest, match="got GridClassifier"):
        grid_of(model)
    with pytest.raises(BadRequest, match="tau=0 must be above 0"):
        DiTRouting(tau=0)
    other = PvtV2ForImageClassification(base())
    for name in ROUTERS:
        build = card(name).build
        with pytest.raises(BadRequest, match="got PvtV2ForImageClassification"), attach(other, build()):
            pass
        with pytest.raises(BadRequest, match="give Budget"):
            build(Budget(tokens=3))


def test_every_pair_is_refused_in_one_sentence():
    model = grid()
    before = fingerprint(model)
    for one, two in itertools.combinations_with_replacement(ROUTERS, 2):
        first, second = card(one).build(), card(two).build()
        with attach(model, first), pytest.raises(ValueError, match="both decide routes"), attach(model, second):
            pass
    assert fingerprint(model) == before


def test_learning_decisions_are_exactly_0_and_1_and_open_tokens_share_what_the_first_one_costs():
    odds = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    here = Map(torch.zeros(3, 50, 4), torch.ones(3, 50, dtype=torch.bool), (5, 10), True)
    made = straight_through(odds > 0, odds, here)
    assert torch.equal(made, (odds > 0).float())
    made.amax(-1).sum().backward()
    assert odds.grad is not None and torch.equal(odds.grad != 0, odds > 0)
