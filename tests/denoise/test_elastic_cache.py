"""Elastic-Cache against its transcription (`naive.elastic`), and the laws of widening in mid-forward."""

from __future__ import annotations

import math

import pytest
import torch

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import changed, fingerprint
from pertoken.denoise import elastic_cache
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.dkv_cache import DKVCache
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.elastic_cache import ElasticCache, similarity
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.fixed_interval import FixedInterval
from pertoken.denoise.loop import COMMIT, REFRESH, Denoise
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold
from pertoken.denoise.watch import Watch
from pertoken.depth.skip_layers import SkipLayers
from pertoken.models.adapter import adapter_for
from tests.contract.conftest import FAMILIES
from tests.denoise import naive
from tests.denoise.conftest import END, MASK, alone, bidirectional, fill, prompts

LENGTH, WINDOW, TAU = 20, 5, 0.15
LENGTHS = (5, 2, 9)
FLAT = {"gemma2": 0.99}  # random weights read almost evenly: similarities are high


@pytest.fixture(scope="module")
def llama():
    return bidirectional("llama", 4, seed=5)


def elastic(shift=0, commit=None, canvas=None, **options):
    rule = ElasticCache(**({"window": WINDOW} | options))
    return Denoise(commit or Threshold(TAU), rule, canvas, shift=shift)


@pytest.fixture
def levels(monkeypatch):
    """Layers computed whole, by row of the batch, at every forward."""
    found, forward = [], DiffusionModel.forward

    def watched(self, canvas, planned):
        out = forward(self, canvas, planned)
        found.append(dict(zip(canvas.numbers, self.whole.tolist(), strict=True)))
        return out

    monkeypatch.setattr(DiffusionModel, "forward", watched)
    return found


def transcribed(model, inputs, row, shift, **options):
    prompt = alone(inputs, row)["input_ids"][0].tolist()
    return naive.elastic(model, prompt, LENGTH, shift, MASK, **({"window": WINDOW, "epsilon": TAU} | options))


@pytest.mark.parametrize("group", [1, 3, None])
@pytest.mark.parametrize("gamma", [0.0, 0.75, 0.9, 1.5])
@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("axis", ["heads", "keys"])
@pytest.mark.parametrize("shift", [0, 1])
def test_twin(llama, levels, shift, axis, far, gamma, group):
    inputs, options = prompts(*LENGTHS), {"axis": axis, "far": far, "gamma": gamma}
    decoder = elastic(shift, group=group, track=2, **options)
    with decoder.record() as trace:
        out = fill(llama, inputs, decoder, LENGTH)
    padding = (inputs["attention_mask"] == 0).sum(-1).tolist()
    for row in range(3):
        run = transcribed(llama, inputs, row, shift, track=2, **options)
        assert run.canvas == out[row].tolist()
        commits = [step.decision.keep[step.rows.index(row)] for step in trace.at(COMMIT) if row in step.rows]
        assert [(keep.nonzero().flatten() - padding[row]).tolist() for keep in commits] == [
            step.committed for step in run.steps
        ]
        computed = [step.decision.keep[step.rows.index(row)] for step in trace.at(REFRESH) if row in step.rows]
        assert [(keep.nonzero().flatten() - padding[row]).tolist() for keep in computed] == [
            step.computed for step in run.steps
        ]
        whole, size = [step[row] for step in levels if row in step], LENGTHS[row] + LENGTH
        for mine, step in zip(whole, run.steps, strict=True):
            assert mine == step.refreshed or (mine == 4 and len(step.computed) == size), "asked for everything anyway"


@pytest.mark.parametrize("axis", ["heads", "keys"])
def test_every_similarity_is_the_twins(llama, monkeypatch, axis):
    found = []

    def kept(*args):
        sigma = similarity(*args)
        found.extend(sigma[:, 0].tolist())
        return sigma

    monkeypatch.setattr(elastic_cache, "similarity", kept)
    inputs = prompts(9, 5)
    fill(llama, alone(inputs, 1), elastic(axis=axis, group=1, gamma=0.8), LENGTH)
    run = transcribed(llama, inputs, 1, 0, axis=axis, gamma=0.8)
    assert len(found) == len(run.sigmas) and min(run.sigmas) < 0.8 < max(run.sigmas)
    assert found == pytest.approx(run.sigmas, abs=1e-5)


def test_work_counts_layers_times_positions(llama):
    inputs, size = alone(prompts(9, 5), 1), 5 + LENGTH
    lazy = elastic(gamma=0.0)
    fill(llama, inputs, lazy, LENGTH)
    run = transcribed(llama, prompts(9, 5), 1, 0, gamma=0.0)
    assert lazy.stats.token_layers == 4 * sum(len(step.computed) for step in run.steps)
    assert lazy.stats.whole_layers == 4
    plain = Denoise(Threshold(TAU), sliding=WINDOW)
    fill(llama, inputs, plain, LENGTH)
    assert plain.stats.token_layers == 4 * plain.stats.token_forwards == 4 * size * plain.stats.steps
    assert plain.stats.whole_layers == 4 * plain.stats.steps


@pytest.fixture
def outputs(monkeypatch):
    """The logits of every step."""
    found, logits = [], DiffusionModel.logits

    def kept(self, places):
        found.append(logits(self, places))
        return found[-1].clone()

    monkeypatch.setattr(DiffusionModel, "logits", kept)
    return found


@pytest.mark.parametrize("canvas", [None, EndOfText()])
@pytest.mark.parametrize("commit", [Threshold(TAU), Schedule()])
@pytest.mark.parametrize("shift", [0, 1])
def test_full_refresh_is_no_cache_bit_for_bit(llama, outputs, commit, canvas, shift):
    inputs, options = prompts(6, 10), {"eos_token_id": END}
    plain = fill(llama, inputs, Denoise(commit, Recompute(), canvas, sliding=WINDOW, shift=shift), LENGTH, **options)
    reference = list(outputs)
    outputs.clear()
    full = elastic(shift, commit, canvas, gamma=math.inf)
    assert fill(llama, inputs, full, LENGTH, **options).equal(plain)
    assert len(outputs) == len(reference)
    assert all(one.equal(other) for one, other in zip(outputs, reference, strict=True))
    outputs.clear()
    fill(llama, inputs, elastic(shift, commit, canvas, gamma=1.5), LENGTH, **options)
    assert not all(one.equal(other) for one, other in zip(outputs, reference, strict=False))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_whole_refresh_leaves_nothing_old(llama, levels, shift):
    inputs, plain = prompts(6, 10), Denoise(Threshold(TAU), sliding=WINDOW, shift=shift)
    always, sometimes = (elastic(shift, gamma=gamma, whole=True) for gamma in (1.5, 0.6))
    assert fill(llama, inputs, always, LENGTH).equal(fill(llama, inputs, plain, LENGTH))
    assert always.stats.whole_layers == 4 * always.stats.row_steps
    levels.clear()
    together = fill(llama, inputs, sometimes, LENGTH)
    assert {level for step in levels for level in step.values()} == {0, 4}
    for row in range(2):
        assert fill(llama, alone(inputs, row), sometimes, LENGTH)[0].tolist() == together[row].tolist()


class At(Watch):
    """Widens row r from layer `layers[r]` on, by the row's number in the batch."""

    def __init__(self, layers, group):
        self.layers, self.size, self.shown = torch.tensor(layers), group, []

    def wanted(self, canvas):
        return torch.zeros_like(canvas.valid)

    def group(self, model, canvas):
        return self.size

    def before(self, model, canvas, first, last):
        pass

    def after(self, model, canvas, first, last):
        self.shown.append((first, last))
        return self.layers.clamp(min=0)

    def finish(self, model, canvas):
        pass

    def select(self, rows):
        self.layers = self.layers[rows]


def watched(model, inputs, watch, shift=0):
    """A canvas after a full first forward in which every row has then got two tokens, and its model."""
    canvas = Canvas.of(inputs["input_ids"], inputs["attention_mask"], LENGTH, LENGTH, MASK)
    diffusion = DiffusionModel(adapter_for(model), canvas, shift)
    diffusion.watched_by(watch)
    diffusion.forward(canvas, canvas.valid)
    chosen = torch.zeros_like(canvas.masked)
    chosen[:, canvas.start + 1] = chosen[:, canvas.start + 3] = True
    canvas.commit(chosen, torch.full_like(canvas.ids, 7))
    canvas.advance()
    return canvas, diffusion, chosen


@pytest.mark.parametrize("group", [1, 2, 4])
def test_rows_widen_each_from_its_own_layer(llama, group):
    inputs = prompts(6, 10, 8)
    with torch.inference_mode():
        canvas, mixed, chosen = watched(llama, inputs, At([4, 0, 2], group))
        before = mixed.states.clone()
        computed = mixed.forward(canvas, chosen)
        assert mixed.whole.tolist() == [0, 4, 2]
        sizes = canvas.valid.sum(-1).tolist()
        assert mixed.work.tolist() == [4 * 2, 4 * 2 + 4 * sizes[1], 4 * 2 + 2 * sizes[2]]
        assert computed[0].equal(chosen[0]) and computed[1:].equal(canvas.valid[1:])
        kept = ~torch.nn.functional.pad(chosen, (0, 1))
        assert mixed.states[:, 0, kept[0]].equal(before[:, 0, kept[0]])
        assert mixed.states[:2, 2, kept[2]].equal(before[:2, 2, kept[2]])
        assert not mixed.states[2:, 2, kept[2]].isclose(before[2:, 2, kept[2]]).all()
        for row, layer in enumerate((4, 0, 2)):
            own, single, only = watched(llama, alone(inputs, row), At([layer], 1))
            single.forward(own, only)
            valid = canvas.valid[row].nonzero().flatten()
            for mine, theirs in (
                (mixed.states[:, row, valid], single.states[:, 0, :-1]),
                (mixed.cache.buffer[:, :, row, :, valid], single.cache.buffer[:, :, 0, :, :-1]),
                (mixed.cache.queries[:, row, :, valid], single.cache.queries[:, 0, :, :-1]),
            ):
                assert torch.allclose(mine, theirs, atol=1e-4)


def test_widening_from_layer_0_is_a_full_forward(llama):
    inputs = prompts(6, 10)
    with torch.inference_mode():
        canvas, wide, chosen = watched(llama, inputs, At([0, 0], 1))
        wide.forward(canvas, chosen)
        _, full, _ = watched(llama, inputs, At([4, 4], 1))
        full.forward(canvas, canvas.valid)
    valid = canvas.valid[..., None]
    assert torch.allclose(wide.states[:, :, :-1] * valid, full.states[:, :, :-1] * valid, atol=1e-4)
    assert wide.watch.shown == [(0, 1)], "no layer runs narrow once every row is wide"


def test_inputs_are_kept_while_keys_are_reused(llama):
    """What enters a later refresh at tokens decided since is not what entered when they were masked."""
    with torch.inference_mode():
        canvas, model, chosen = watched(llama, prompts(6, 10), At([4, 4], 2))
        before = model.states.clone()
        model.forward(canvas, chosen)
        _, exact, _ = watched(llama, prompts(6, 10), At([4, 4], 2))
        exact.forward(canvas, canvas.valid)
    for layer in range(4):
        moved = (before[layer, :, :-1] - exact.states[layer, :, :-1])[chosen].norm()
        left = (model.states[layer, :, :-1] - exact.states[layer, :, :-1])[chosen].norm()
        assert left < moved / 2


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_batch(levels, family, shift):
    model, inputs = bidirectional(family, 4, seed=3), prompts(7, 3, 12)
    decoder = elastic(shift, gamma=FLAT.get(family, 0.85))
    together = fill(model, inputs, decoder, LENGTH)
    assert any(len(set(step.values())) > 1 for step in levels), "rows must have got different decisions"
    assert 4 * 3 < decoder.stats.whole_layers < 4 * decoder.stats.row_steps
    batch = list(levels)
    for row in range(3):
        levels.clear()
        assert fill(model, alone(inputs, row), decoder, LENGTH)[0].tolist() == together[row].tolist()
        assert [step[0] for step in levels] == [step[row] for step in batch if row in step]


def test_modules_and_fused_layers_agree(llama, levels):
    inputs, decoder = prompts(7, 3, 12), elastic(1, gamma=0.8)
    fused = fill(llama, inputs, decoder, LENGTH)
    first = list(levels)
    levels.clear()
    hook = llama.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        assert fill(llama, inputs, decoder, LENGTH).equal(fused)
    finally:
        hook.remove()
    assert levels == first


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(models, family, fails):
    model = models[family]
    hook = model.lm_head.register_forward_hook(lambda *_: None)  # the model's own layers run
    if fails:
        last = adapter_for(model).layers[-1].register_forward_hook(lambda *_: 1 / 0)
    before = fingerprint(model, deep=True)
    try:
        if fails:
            with pytest.raises(ZeroDivisionError):
                fill(model, prompts(5), elastic(), LENGTH)
        else:
            fill(model, prompts(5), elastic(), LENGTH)
        assert changed(before, fingerprint(model, deep=True)) == []
    finally:
        hook.remove()
        if fails:
            last.remove()


def test_a_model_that_hides_its_queries_is_refused(models):
    with (
        attach(models["qwen3"], SkipLayers(Budget(layers=2))),
        pytest.raises(BadRequest, match=r"qwen3 model showed no queries.*Use a refresh rule"),
    ):
        fill(models["qwen3"], prompts(5), elastic(), LENGTH)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_never_computed_is_never_read(models, monkeypatch, family):
    model, inputs, decoder = models[family], prompts(7, 3, 12), elastic(1, gamma=0.8)
    clean = fill(model, inputs, decoder, LENGTH)
    open_, made = DiffusionModel._run, []

    def poisoned(self, canvas, block, first, last, hidden=None):
        fresh = self.states is None
        out = open_(self, canvas, block, first, last, hidden)
        if fresh:
            made.append(self)
            for kept in (self.states, self.cache.queries):
                kept[..., -1, :] = torch.nan
            self.states[:, :, :-1].masked_fill_(~canvas.valid[None, :, :, None], torch.nan)
            self.cache.queries[..., :-1, :].masked_fill_(~canvas.valid[None, :, None, :, None], torch.nan)
            self.cache.buffer[..., -1, :] = torch.nan
        return out

    monkeypatch.setattr(DiffusionModel, "_run", poisoned)
    assert fill(model, inputs, decoder, LENGTH).equal(clean)
    assert len(made) == 1


def test_without_a_change_nothing_drifts(llama):
    rule = ElasticCache(window=WINDOW, gamma=0.9999, track=2)
    for axis in ("heads", "keys"):
        watch = elastic_cache.Drift(ElasticCache(window=WINDOW, gamma=0.9999, track=2, axis=axis))
        inputs = prompts(6, 10)
        canvas = Canvas.of(inputs["input_ids"], inputs["attention_mask"], LENGTH, LENGTH, MASK, WINDOW)
        with torch.inference_mode():
            model = DiffusionModel(adapter_for(llama), canvas, 0)
            model.watched_by(watch)
            model.forward(canvas, rule.plan(canvas, None))
            assert model.whole.tolist() == [4, 4] and watch.tracked.any(-1).all()
            canvas.advance()
            tracked = watch.tracked.clone()
            computed = model.forward(canvas, rule.plan(canvas, None))
            assert computed.equal(tracked | (canvas.masked & canvas.in_block))
            assert model.whole.tolist() == [0, 0]
            assert torch.cat(watch.sigma).sub(1).abs().max() < 1e-5
            assert watch.tracked.equal(tracked), "the same attention tracks the same tokens"


def test_both_sides_are_the_same_tokens(llama, monkeypatch):
    asked, made = [], DiffusionModel.attention
    drifts = []

    def seen(self, canvas, columns, first, last):
        asked.append(columns)
        return made(self, canvas, columns, first, last)

    def tracked(self, model, canvas, first, last):
        drifts.append((self.tracked.clone(), self.columns, self.real))
        return before(self, model, canvas, first, last)

    before = elastic_cache.Drift.before
    monkeypatch.setattr(DiffusionModel, "attention", seen)
    monkeypatch.setattr(elastic_cache.Drift, "before", tracked)
    fill(llama, prompts(7, 3), elastic(gamma=0.5), LENGTH)
    assert drifts
    for chosen, columns, real in drifts:
        again = torch.zeros_like(chosen).scatter_(1, columns, real)
        assert again.equal(chosen)
        assert sum(columns is other for other in asked) == 2, "once before and once after the layers"


@pytest.mark.parametrize("axis", ["heads", "keys"])
def test_padding_counts_on_neither_side(axis):
    torch.manual_seed(0)
    old, now = (torch.randn(2, 1, 4, 3, 7).softmax(-1) for _ in range(2))
    seen, real = torch.ones(1, 1, 3, 7, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    plain = similarity(old, now, seen, real, axis)
    pad = torch.nn.functional.pad
    wide = [pad(x, (0, 5, 0, 2)) for x in (old, now)]
    wide[0][..., 3:, :], wide[1][..., 3:, :3] = 0.1, 0.3
    padded = similarity(*wide, pad(seen, (0, 5, 0, 2)), pad(real, (0, 2)), axis)
    assert torch.allclose(plain, padded, atol=1e-6)
    assert plain.min() < 0.95
    assert similarity(old, old, seen, real, axis).sub(1).abs().max() < 1e-6
    assert (similarity(old, now, seen, ~real, axis) == -torch.inf).all()


def test_small_weights_count_as_much_as_large_ones():
    """The head-axis cosine of a key does not change when all heads read it a billion billion times less; one that no
    head reads, before and now, is unchanged."""
    torch.manual_seed(0)
    old, now = torch.rand(1, 1, 4, 1, 3), torch.rand(1, 1, 4, 1, 3)
    seen, real = torch.ones(1, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    plain = similarity(old, now, seen, real, "heads")
    assert plain < 0.95
    assert similarity(old * 1e-18, now * 1e-27, seen, real, "heads").allclose(plain)
    assert similarity(old * 0, now * 0, seen, real, "heads").sub(1).abs() < 1e-6


def test_the_refresh_share_grows_with_gamma(llama):
    shares = []
    for gamma in (0.0, 0.6, 0.75, 0.85, 0.95, math.inf):
        decoder = elastic(gamma=gamma, commit=Schedule())
        fill(llama, prompts(*LENGTHS), decoder, LENGTH)
        assert decoder.stats.row_steps == 3 * LENGTH
        shares.append(decoder.stats.whole_layers / (4 * decoder.stats.row_steps))
    assert shares == sorted(shares) and len(set(shares)) == len(shares)
    assert shares[0] == pytest.approx(1 / LENGTH) and shares[-1] == 1


def test_the_window_slides_over_the_undecided(llama):
    canvas = Canvas.of(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), 6, 6, MASK, 3)
    chosen = torch.zeros(2, 9, dtype=torch.bool)
    chosen[0, [3, 5]] = True
    chosen[1, 3:8] = True
    canvas.commit(chosen, torch.full_like(canvas.ids, 7))
    assert canvas.block_columns[0].tolist() == [4, 6, 7]
    assert canvas.block_columns[1].tolist() == [8, 0, 1], "filled up with decided columns"
    assert canvas.in_block.nonzero().tolist() == [[0, 4], [0, 6], [0, 7], [1, 8]]
    for commit in (Schedule(), Threshold(TAU)):
        decoder = Denoise(commit, sliding=3)
        with decoder.record() as trace:
            fill(llama, prompts(4), decoder, LENGTH)
        left = list(range(4, 4 + LENGTH))
        for step in trace.at(COMMIT):
            now = step.decision.keep[0].nonzero().flatten().tolist()
            assert set(now) <= set(left[:3])
            left = [c for c in left if c not in now]
        assert left == []
    wide, whole = Denoise(Threshold(TAU), sliding=500), Denoise(Threshold(TAU), block=None)
    assert fill(llama, prompts(4, 9), wide, LENGTH).equal(fill(llama, prompts(4, 9), whole, LENGTH))


@pytest.mark.parametrize("refresh", [DualCache(), DKVCache(8), FixedInterval(math.inf, None)])
def test_caches_know_what_a_sliding_block_decided(llama, refresh):
    decoder = Denoise(Threshold(TAU), refresh, sliding=4)
    with decoder.record() as trace:
        fill(llama, prompts(6, 6), decoder, LENGTH)
    commits, computed = ([step.decision.keep for step in trace.at(site)] for site in (COMMIT, REFRESH))
    assert any(not keep.all() for keep in computed)
    for before, after in zip(commits, computed[1:], strict=False):
        if before.shape == after.shape:
            assert (after | ~before).all(), "a decided token is computed with its embedding"


def test_blocks_in_place_of_the_window(llama):
    decoder = Denoise(Threshold(TAU), ElasticCache(window=None, gamma=math.inf), block=4)
    assert fill(llama, prompts(4, 9), decoder, LENGTH).equal(
        fill(llama, prompts(4, 9), Denoise(Threshold(TAU), block=4), LENGTH)
    )
    lazy = Denoise(Threshold(TAU), ElasticCache(window=None, gamma=0.5), block=4)
    fill(llama, prompts(4, 9), lazy, LENGTH)
    assert lazy.stats.token_layers < decoder.stats.token_layers


def test_as_a_decoder_it_has_the_papers_partners(llama):
    inputs, options = prompts(4, 9), {"eos_token_id": END}
    own = fill(llama, inputs, ElasticCache(), LENGTH, **options)
    assert own.equal(fill(llama, inputs, Denoise(Threshold(0.9), ElasticCache(), EndOfText()), LENGTH, **options))


def test_fixed_interval(llama):
    inputs = prompts(*LENGTHS)
    plain = Denoise(Threshold(TAU), sliding=WINDOW)
    expected = fill(llama, inputs, plain, LENGTH)
    assert fill(llama, inputs, Denoise(Threshold(TAU), FixedInterval(1, WINDOW)), LENGTH).equal(expected)
    whole = []
    for interval in (1, 2.5, 6, math.inf):
        decoder = Denoise(Schedule(), FixedInterval(interval, WINDOW))
        fill(llama, inputs, decoder, LENGTH)
        whole.append(decoder.stats.whole_layers / (4 * 3))
    assert whole == [LENGTH, LENGTH / 2.5, math.ceil(LENGTH / 6), 1]
    with pytest.raises(BadRequest, match=r"interval=0\.5"):
        FixedInterval(0.5)


def test_an_empty_prompt_has_nothing_to_track_and_is_refreshed(llama):
    inputs = prompts(4, 9)
    inputs["attention_mask"][0] = 0
    decoder = elastic(gamma=0.0)
    out = fill(llama, inputs, decoder, LENGTH)
    assert not (out == MASK).any()
    assert decoder.stats.whole_layers >= 4 * 2 + 3
    assert out[1].tolist() == fill(llama, alone(inputs, 1), decoder, LENGTH)[0].tolist()


@pytest.mark.parametrize("shift", [0, 1])
def test_bf16(shift):
    for family in ("llama", "gemma2", "gpt2"):
        model = bidirectional(family, 4, seed=2).to(torch.bfloat16)
        decoder = elastic(shift, gamma=FLAT.get(family, 0.85))
        out = fill(model, prompts(7, 3, 12), decoder, LENGTH)
        assert not (out == MASK).any()
        assert 12 < decoder.stats.whole_layers < 4 * decoder.stats.row_steps


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 0}, "window=0"),
        ({"track": 0}, "track=0"),
        ({"group": 0}, "group=0"),
        ({"axis": "rows"}, "axis='rows'"),
        ({"gamma": math.nan}, "gamma is not a number"),
    ],
)
def test_bad_requests(options, says):
    with pytest.raises(BadRequest, match=says):
        ElasticCache(**options)


def test_an_empty_sliding_block_is_refused(llama):
    with pytest.raises(BadRequest, match="sliding block of 0"):
        fill(llama, prompts(4), Denoise(sliding=0), LENGTH)
