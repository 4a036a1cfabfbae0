"""The denoising loop: rows do not depend on their batch, full refresh changes nothing, bad input is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace, TraceMismatch
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.dkv_cache import DKVCache, DKVCacheGreedy
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.entropy_bound import EntropyBound
from pertoken.denoise.factor import Factor
from pertoken.denoise.learn2pd import Filter, Learn2PD
from pertoken.denoise.loop import COMMIT, REFRESH, Denoise, DenoisingInterrupted
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.prefix_cache import PrefixCache
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.rules import Constraint, RefreshRule
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold
from tests.denoise.conftest import END, MASK, alone, fill, prompts


def untrained(block: int = 8) -> Filter:
    torch.manual_seed(3)
    return Filter(block)


COMMITS = {
    "schedule": Schedule(),
    "threshold": Threshold(0.3),
    "factor": Factor(1.9),
    "entropy_bound": EntropyBound(2.5),
    "random_commit": RandomCommit(2),
    "learn2pd": Learn2PD(untrained(), tau=0.5),
}
REFRESHES = {
    "recompute": None,
    "prefix_cache": PrefixCache(),
    "dual_cache": DualCache(),
    "dkv_cache": DKVCache(3),
    "dkv_cache_greedy": DKVCacheGreedy(),
}


def denoiser(commit="schedule", refresh="recompute", **options):
    chosen = {} if REFRESHES[refresh] is None else {"refresh": REFRESHES[refresh]}
    return Denoise(COMMITS[commit], **chosen, **({"block": 8} | options))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("commit", COMMITS)
def test_a_row_does_not_depend_on_its_batch(model, commit, refresh, shift):
    inputs, decoder = prompts(7, 3, 12), denoiser(commit, refresh, shift=shift)
    with decoder.record() as trace:
        together = fill(model, inputs, decoder)
    counts = {row: [] for row in range(3)}
    for step in trace.at(COMMIT):
        for row, kept in zip(step.rows, step.decision.keep, strict=True):
            counts[row].append(int(kept.sum()))
    if commit not in ("schedule", "random_commit"):
        assert len(set(map(tuple, counts.values()))) > 1, "rows must have got different decisions"
        assert max(map(max, counts.values())) > 1
    for row in range(3):
        assert fill(model, alone(inputs, row), decoder)[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma"])
def test_every_family_is_filled_in(models, family):
    inputs, decoder = prompts(5, 9), denoiser("threshold", "dual_cache")
    out = fill(models[family], inputs, decoder)
    assert not (out == MASK).any()
    assert out[1].tolist() == fill(models[family], alone(inputs, 1), decoder)[0].tolist()


class Everything(RefreshRule):
    """Every cache at its full-refresh setting."""

    def __init__(self, inner):
        self.inner = inner

    def plan(self, canvas, upcoming):
        self.inner.plan(canvas, upcoming)
        return torch.ones_like(canvas.valid)


@pytest.mark.parametrize("refresh", [name for name in REFRESHES if name != "recompute"])
@pytest.mark.parametrize("shift", [0, 1])
def test_full_refresh_is_no_cache_bit_for_bit(model, refresh, shift):
    inputs = prompts(6, 10)
    plain, full = (
        denoiser("threshold", shift=shift),
        Denoise(COMMITS["threshold"], Everything(REFRESHES[refresh]), block=8),
    )
    full = Denoise(COMMITS["threshold"], Everything(REFRESHES[refresh]), block=8, shift=shift)
    assert fill(model, inputs, plain).equal(fill(model, inputs, full))
    assert full.stats.token_forwards == plain.stats.token_forwards
    one = Denoise(COMMITS["threshold"], DKVCache(1), block=8, shift=shift)
    assert fill(model, inputs, one).equal(fill(model, inputs, plain))


def test_caches_compute_less_and_a_cache_hit_is_not_a_recomputation(model):
    inputs, forwards = prompts(6, 10), {}
    for refresh in REFRESHES:
        decoder = denoiser("schedule", refresh)
        fill(model, inputs, decoder)
        forwards[refresh] = decoder.stats.token_forwards
    assert forwards["dual_cache"] < forwards["prefix_cache"] < forwards["recompute"]
    assert forwards["dkv_cache"] < forwards["recompute"]


def test_a_threshold_above_one_is_one_commit_per_step(model):
    inputs = prompts(6, 10)
    plain, high = denoiser(), Denoise(Threshold(1.5), block=8)
    assert fill(model, inputs, plain).equal(fill(model, inputs, high))
    assert plain.stats.steps == high.stats.steps == 16


def test_a_filter_at_one_is_the_schedule(model):
    inputs = prompts(6, 10)
    for steps in (16, 8, 4):
        plain, closed = denoiser(steps=steps), Denoise(Learn2PD(untrained(), tau=1.0), block=8, steps=steps)
        assert fill(model, inputs, plain).equal(fill(model, inputs, closed))
        assert closed.stats.steps == steps


def test_block_one_goes_from_left_to_right(model):
    decoder = denoiser(block=1)
    with decoder.record() as trace:
        fill(model, prompts(5), decoder)
    columns = [int(step.decision.keep[0].nonzero()) for step in trace.at(COMMIT)]
    assert columns == list(range(5, 21))


def test_the_trace_holds_every_commit_once_and_survives_saving(model, tmp_path):
    decoder = denoiser("threshold", "dkv_cache")
    with decoder.record() as trace:
        fill(model, prompts(5, 8), decoder)
    total = torch.zeros(2, 24)
    for step in trace.at(COMMIT):
        total[list(step.rows)] += step.decision.keep
    assert total[:, 8:].eq(1).all() and total[:, :8].eq(0).all()
    computed = sum(int(step.decision.keep.sum()) for step in trace.at(REFRESH))
    assert computed == decoder.stats.token_forwards
    trace.save(tmp_path / "t")
    assert len(Trace.load(tmp_path / "t").steps) == len(trace.steps)


def test_the_end_of_text_cuts_its_row_and_saves_work(model):
    inputs = prompts(6, 10)
    model.lm_head.weight.data[END] += 0.1 * model.lm_head.weight.data.std()
    plain, cut = denoiser(), denoiser(canvas=EndOfText())
    options = {"eos_token_id": END, "length": 32}
    dense = fill(model, inputs, plain, **options)
    ends = [(row == END).nonzero() for row in dense]
    short = fill(model, inputs, cut, **options)
    if any(len(e) for e in ends):
        assert cut.stats.token_forwards < plain.stats.token_forwards
    for row in short.tolist():
        if END in row:
            assert set(row[row.index(END) + 1 :]) <= {0}


def test_a_cut_row_forgets_what_lies_behind():
    canvas = Canvas.of(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), 4, 4, MASK)
    canvas.cut(torch.tensor([5, 7]), END)
    assert canvas.valid.tolist() == [[True] * 5 + [False] * 2, [True] * 7]
    assert canvas.masked.sum(-1).tolist() == [2, 4]
    assert canvas.ids[0, 5:].tolist() == [END, END]


def test_sampling_follows_its_seed_and_differs_from_greedy(model):
    inputs, decoder = prompts(6, 10), denoiser("threshold")
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(fill(model, inputs, decoder, do_sample=True, temperature=1.5))
    assert outs[0].equal(outs[1]) and not outs[0].equal(outs[2])
    assert not outs[0].equal(fill(model, inputs, decoder))


def test_sampled_tokens_have_the_models_law(model):
    inputs = {name: value.expand(400, -1) for name, value in prompts(5).items()}
    with torch.inference_mode():
        canvas = torch.cat([inputs["input_ids"][:1], torch.tensor([[MASK]])], 1)
        full = torch.zeros(1, 1, 6, 6)
        logits = model(canvas, attention_mask=full).logits[0, -1]
        logits[MASK] = -torch.inf
        law = logits.softmax(-1)
    torch.manual_seed(0)
    out = fill(model, inputs, denoiser(block=1), length=1, do_sample=True, top_k=0)
    drawn = torch.bincount(out.flatten(), minlength=len(law)).double() / 400
    assert (drawn - law).abs().sum() / 2 < 0.25
    likely = law.topk(3).indices
    assert (drawn[likely] - law[likely]).abs().max() < 4 * (law[likely] * (1 - law[likely]) / 400).sqrt().max() + 1e-3


class Never(StoppingCriteria):
    def __call__(self, ids, scores, **_):
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 20}, "block=8 does not divide the canvas of 20"),
        ({"decoder": {"steps": 3}}, "steps=3 do not divide over 2 blocks"),
        ({"decoder": {"mask_token": 5000}}, "mask token 5000"),
        ({"decoder": {"shift": 2}}, "shift=2"),
        ({"length": 4096}, "positions"),
        ({"decoder": {"commit": Learn2PD()}}, "no filter"),
        ({"decoder": {"commit": Learn2PD(untrained(4))}}, "blocks of 4"),
        ({"decoder": {"commit": Learn2PD("nowhere")}}, "no filter at nowhere"),
        ({"stopping_criteria": StoppingCriteriaList([Never()])}, "Never"),
    ],
)
def test_bad_requests_say_what_is_wrong(model, options, says):
    options = dict(options)
    decoder = Denoise(**({"block": 8} | options.pop("decoder", {})))
    with pytest.raises(BadRequest, match=says):
        fill(model, prompts(5), decoder, **options)


@pytest.mark.parametrize("commit", COMMITS)
def test_without_a_window_only_a_known_order_can_be_committed(model, commit):
    decoder = Denoise(COMMITS[commit], DKVCacheGreedy(3, 0), block=8)
    always = Denoise(COMMITS[commit], DKVCacheGreedy(1, 0), block=8)
    assert fill(model, prompts(5), always).equal(fill(model, prompts(5), Denoise(COMMITS[commit], block=8)))
    if commit != "random_commit":
        with pytest.raises(BadRequest, match="window=0 computes only what is about to be committed"):
            fill(model, prompts(5), decoder)
        return
    with decoder.record() as trace:
        fill(model, prompts(5), decoder)
    for refresh, commits in zip(trace.at(REFRESH), trace.at(COMMIT), strict=True):
        assert not (commits.decision.keep & ~refresh.decision.keep).any(), "committed from outputs of this forward"


def test_a_causal_model_is_refused(models):
    from tests.contract.conftest import FAMILIES

    with pytest.raises(BadRequest, match=r"is causal.*zoo:code-diffusion"):
        fill(FAMILIES["llama"](2).eval(), prompts(5), denoiser())


def test_a_model_without_a_mask_token_is_refused(model):
    model.config.mask_token_id = None
    try:
        with pytest.raises(BadRequest, match="mask token None"):
            fill(model, prompts(5), denoiser())
    finally:
        model.config.mask_token_id = MASK


def test_right_padding_and_empty_rows_are_refused(model):
    inputs = prompts(5, 3)
    right = {name: value.flip(-1) for name, value in inputs.items()}
    with pytest.raises(BadRequest, match="row 1 is padded on the right"):
        fill(model, right, denoiser())
    inputs["attention_mask"][1] = 0
    with pytest.raises(BadRequest, match="row 1 has an empty prompt"):
        fill(model, inputs, denoiser(shift=1))


def test_nan_logits_are_named(model):
    weight = model.lm_head.weight.data.clone()
    try:
        model.lm_head.weight.data[7] = float("nan")
        with pytest.raises(BadRequest, match="not finite"):
            fill(model, prompts(5), denoiser())
    finally:
        model.lm_head.weight.data.copy_(weight)


def test_another_models_filter_is_refused(model):
    net = untrained()
    net.about["model"] = "0" * 16
    with pytest.raises(BadRequest, match="signature"):
        fill(model, prompts(5), Denoise(Learn2PD(net), block=8))


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("commit", COMMITS)
def test_a_recording_replays_without_the_model_and_without_the_seed(model, commit, refresh, tmp_path):
    inputs, decoder = prompts(7, 3, 12), denoiser(commit, refresh, canvas=EndOfText())
    options = {"eos_token_id": END, "do_sample": True, "temperature": 1.3, "top_k": 0}
    torch.manual_seed(1)
    with decoder.record() as trace:
        first = fill(model, inputs, decoder, **options)
    stats = (decoder.stats.steps, decoder.stats.row_steps, decoder.stats.token_forwards, decoder.stats.tokens)
    trace.save(tmp_path / "t")
    torch.manual_seed(2)
    weight = model.lm_head.weight.data.clone()
    try:
        model.lm_head.weight.data.fill_(float("nan"))
        with decoder.replay(Trace.load(tmp_path / "t")), decoder.record() as again:
            assert fill(model, inputs, decoder, **options).equal(first)
    finally:
        model.lm_head.weight.data.copy_(weight)
    assert again.same_as(trace)
    assert stats == (decoder.stats.steps, decoder.stats.row_steps, decoder.stats.token_forwards, decoder.stats.tokens)


def test_a_recording_of_other_inputs_is_refused(model):
    decoder = denoiser()
    with decoder.record() as trace:
        fill(model, prompts(5, 3), decoder)
    with decoder.replay(trace), pytest.raises(TraceMismatch, match="columns"):
        fill(model, prompts(6, 3), decoder)
    with decoder.replay(trace), pytest.raises(TraceMismatch, match="rows"):
        fill(model, prompts(5), decoder)


class Rising(Constraint):
    """Decided tokens must rise from left to right, each by at least the distance of their columns."""

    def limit(self, scores, canvas, places):
        open_ = ~canvas.masked & (canvas.columns >= canvas.start)
        slack = canvas.ids - canvas.columns
        low = slack.masked_fill(~open_, -(10**6)).cummax(-1).values.gather(1, places) + places
        high = slack.masked_fill(~open_, 10**6).flip(-1).cummin(-1).values.flip(-1).gather(1, places) + places
        low = torch.maximum(low, places - canvas.start)
        high = torch.minimum(high, MASK - 1 - (canvas.width - 1 - places))
        token = torch.arange(scores.shape[-1])
        return scores.masked_fill((token < low[..., None]) | (token > high[..., None]), -torch.inf)

    def admit(self, chosen, guess, canvas):
        best = guess.ranked.masked_fill(~chosen, -torch.inf).argmax(-1, keepdim=True)
        return torch.zeros_like(chosen).scatter_(1, best, True) & chosen


class Nothing(Rising):
    def limit(self, scores, canvas, places):
        return torch.full_like(scores, -torch.inf)


@pytest.mark.parametrize("refresh", ["recompute", "dual_cache"])
@pytest.mark.parametrize("commit", COMMITS)
def test_a_constraint_holds_under_every_commit_rule(model, commit, refresh):
    inputs = prompts(7, 3, 12)
    free = fill(model, inputs, denoiser(commit, refresh))
    bound = fill(model, inputs, denoiser(commit, refresh, constraint=Rising()))
    assert not (free.diff(dim=-1) >= 1).all(-1).any(), "the model alone must break it for this to say anything"
    assert (bound.diff(dim=-1) >= 1).all() and (bound != MASK).all()
    own = fill(model, alone(inputs, 1), denoiser(commit, refresh, constraint=Rising()))
    assert own[0].tolist() == bound[1].tolist()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("commit", COMMITS)
def test_only_undecided_places_are_guessed_at_unless_a_rule_reads_the_others(model, commit, sampled, monkeypatch):
    """The same guesses, draws and commits as with guesses for all places, for less work."""
    inputs, asked, logits = prompts(7, 3, 12), [], DiffusionModel.logits

    def counted(self, places):
        asked.append(places.numel())
        return logits(self, places)

    monkeypatch.setattr(DiffusionModel, "logits", counted)
    rule, outs, traces, spent = COMMITS[commit], [], [], []
    for everything in (False, True):
        if everything:
            monkeypatch.setattr(type(rule), "reads_decided", True)
        decoder = Denoise(rule, DualCache(), constraint=Rising(), block=8)
        torch.manual_seed(2)
        with decoder.record() as trace:
            outs.append(fill(model, inputs, decoder, do_sample=sampled))
        traces.append(trace)
        spent.append(sum(asked))
        asked.clear()
    assert outs[0].equal(outs[1]) and traces[0].same_as(traces[1])
    assert (spent[0] < spent[1]) == (commit != "learn2pd")


def test_a_constraint_that_allows_nothing_is_named(model):
    with pytest.raises(BadRequest, match="no token is allowed at position 0 of the canvas for row 0 at step 0"):
        fill(model, prompts(5), denoiser(constraint=Nothing()))


class Stops(Schedule):
    def choose(self, guess, canvas):
        if int(canvas.step.max()) == 5:
            raise KeyboardInterrupt
        return super().choose(guess, canvas)


def test_ctrl_c_keeps_what_is_committed(model):
    inputs = prompts(5, 8)
    whole = fill(model, inputs, denoiser())
    with pytest.raises(KeyboardInterrupt) as stop:
        fill(model, inputs, Denoise(Stops(), block=8))
    assert isinstance(stop.value, DenoisingInterrupted)
    kept = stop.value.sequences[:, 8:]
    assert (kept != MASK).sum(-1).tolist() == [5, 5]
    assert torch.where(kept == MASK, whole, kept).equal(whole)
