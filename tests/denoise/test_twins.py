"""Every commit, refresh and canvas rule against its transcription from the papers (`naive.py`), row by row of ragged
batches: same tokens, same steps, same positions computed and committed at each."""

from __future__ import annotations

import pytest
import torch

from pertoken.denoise.canvas import Canvas
from pertoken.denoise.dkv_cache import DKVCache, DKVCacheGreedy
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.elastic_cache import ElasticCache
from pertoken.denoise.ends import EndOfText
from pertoken.denoise.entropy_bound import EntropyBound
from pertoken.denoise.factor import Factor
from pertoken.denoise.learn2pd import Filter, Learn2PD
from pertoken.denoise.loop import COMMIT, REFRESH, Denoise
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.prefix_cache import PrefixCache
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.rules import Guess
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.threshold import Threshold
from pertoken.models.slots import SlotCache
from tests.contract.conftest import FAMILIES
from tests.denoise import naive
from tests.denoise.conftest import MASK, alone, bidirectional, fill, prompts

LENGTH = 12
LENGTHS = (5, 2, 9)


def network(block):
    """A filter whose verdict on a place depends on all places, and not always the same."""
    torch.manual_seed(block)
    net = Filter(block)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(4)
    return net.eval()


FILTERS = {block: network(block) for block in (4, 6, 12)}
ORDER = torch.rand(LENGTH, generator=torch.Generator().manual_seed(2)).tolist()


def order(begin):
    return {begin + place: ORDER[place] for place in range(LENGTH)}


COMMITS = {
    "schedule": (lambda block: Schedule(), lambda block, begin: naive.schedule),
    "threshold": (lambda block: Threshold(0.45), lambda block, begin: naive.threshold(0.45)),
    "factor": (lambda block: Factor(1.7), lambda block, begin: naive.factor(1.7)),
    "entropy_bound": (lambda block: EntropyBound(2.5), lambda block, begin: naive.entropy_bound(2.5)),
    "random_commit": (lambda block: RandomCommit(2), lambda block, begin: naive.in_order(order(begin))),
    "learn2pd": (
        lambda block: Learn2PD(FILTERS[block], tau=0.3),
        lambda block, begin: naive.learned(FILTERS[block], block, 0.3),
    ),
}
REFRESHES = {
    "recompute": (Recompute(), lambda commit, begin: naive.Full()),
    "prefix_cache": (PrefixCache(), lambda commit, begin: naive.Prefix()),
    "dual_cache": (DualCache(), lambda commit, begin: naive.Dual()),
    "dkv_cache": (DKVCache(4), lambda commit, begin: naive.DKVDecode(4)),
    "dkv_cache_greedy": (
        DKVCacheGreedy(3, 1),
        lambda commit, begin: naive.DKVGreedy(3, 1, order(begin) if commit == "random_commit" else None),
    ),
}


@pytest.fixture(scope="module")
def llama():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        weights = FAMILIES["llama"](3).state_dict()
    model = bidirectional("llama")
    model.load_state_dict(weights)
    return model


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Slots that nobody wrote hold NaN, which would spread to every logit, and padding holds large numbers."""
    made = DiffusionModel.__init__

    def make(self, adapter, canvas, shift):
        made(self, adapter, canvas, shift)
        self.cache.buffer.fill_(float("nan"))
        slots = self.cache.buffer[..., :-1, :]
        slots.masked_fill_(~canvas.valid[None, None, :, None, :, None], 50.0)

    kept = SlotCache.keep_queries

    def keep(self, heads):
        kept(self, heads)
        self.queries.fill_(float("nan"))

    monkeypatch.setattr(DiffusionModel, "__init__", make)
    monkeypatch.setattr(SlotCache, "keep_queries", keep)


def by_row(trace, inputs):
    """Per row the positions computed and committed at each of its steps, counted without padding."""
    padding = (inputs["attention_mask"] == 0).sum(-1).tolist()
    steps = {row: [] for row in range(len(padding))}
    for refresh, commit in zip(trace.at(REFRESH), trace.at(COMMIT), strict=True):
        for place, row in enumerate(commit.rows):
            kept = [d.keep[place].nonzero().flatten() - padding[row] for d in (refresh.decision, commit.decision)]
            steps[row].append(tuple(k.tolist() for k in kept))
    return steps


def library(model, inputs, decoder, **options):
    """Canvases, steps of every row, and how many layers each step ran for all positions, by row."""
    with decoder.record() as trace:
        out = fill(model, inputs, decoder, LENGTH, **options).tolist()
    steps = by_row(trace, inputs)
    assert sum(map(len, steps.values())) == decoder.stats.row_steps
    assert max(map(len, steps.values())) == decoder.stats.steps, "a row that is done leaves the batch"
    return out, steps


def finished(canvas, length, end=None, pad=0):
    """What `generate` returns of a canvas: behind the first end of text, padding."""
    row = canvas + [end] * (length - len(canvas))
    return row if end not in row else row[: row.index(end) + 1] + [pad] * (length - row.index(end) - 1)


def check(run, tokens, steps, end=None):
    assert [(step.computed, step.committed) for step in run.steps] == steps
    assert finished(run.canvas, LENGTH, end) == tokens


def prompt_of(inputs, row):
    return alone(inputs, row)["input_ids"][0].tolist()


PARALLEL = ("threshold", "factor", "entropy_bound")  # rules that take no notice of `steps`


def twins(model, commit, refresh, block, shift, **options):
    """A decoder, and its transcription as a function of the prompt."""
    theirs, ours = COMMITS[commit], REFRESHES[refresh]
    steps = None if commit in PARALLEL else 6
    decoder = Denoise(theirs[0](block), ours[0], block=block, steps=steps, shift=shift, **options)

    def transcribed(prompt, cut=None):
        begin = len(prompt)
        rules = theirs[1](block, begin), ours[1](commit, begin), cut
        return naive.decode(model, prompt, LENGTH, block, steps or LENGTH, shift, MASK, *rules)

    return decoder, transcribed


@pytest.mark.parametrize(("block", "shift"), [(6, 0), (6, 1), (12, 1)])
@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("commit", COMMITS)
def test_every_commit_rule_with_every_refresh_rule(llama, commit, refresh, block, shift):
    inputs = prompts(*LENGTHS)
    decoder, transcribed = twins(llama, commit, refresh, block, shift)
    out, steps = library(llama, inputs, decoder)
    for row in range(len(LENGTHS)):
        check(transcribed(prompt_of(inputs, row)), out[row], steps[row])
    commits = [len(committed) for row in steps.values() for _, committed in row]
    assert max(commits) > 1, "a run of single commits tells rules from nothing"
    if commit in (*PARALLEL, "learn2pd"):
        assert len(set(commits)) > 1
        assert len({tuple(map(len, (c for _, c in row))) for row in steps.values()}) > 1, "rows go at their own pace"
    if refresh != "recompute":
        everything = [length + LENGTH for length in LENGTHS]
        assert any(len(computed) < everything[row] for row, done in steps.items() for computed, _ in done)


@pytest.mark.parametrize("refresh", [name for name in REFRESHES if name != "recompute"])
def test_what_is_read_from_a_cache_is_old(llama, refresh):
    """The cached runs above would prove nothing if a cached key were as good as a new one."""
    inputs = prompts(*LENGTHS)
    fresh, cached = (
        fill(llama, inputs, twins(llama, "random_commit", r, 12, 0)[0], LENGTH) for r in ("recompute", refresh)
    )
    assert not fresh.equal(cached)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("when", ["decided", "predicted"])
@pytest.mark.parametrize("commit", ["threshold", "learn2pd"])
def test_ends_of_text(llama, when, refresh, commit, shift):
    inputs = prompts(*LENGTHS)
    decoder, transcribed = twins(llama, commit, refresh, 4, shift, canvas=EndOfText(when))
    whole, _ = library(llama, inputs, twins(llama, commit, refresh, 4, shift)[0])
    end = max(range(MASK), key=lambda token: sum(token in row[2:-1] for row in whole))
    rule = {"decided": naive.decoded_end, "predicted": naive.predicted_end}[when]
    out, steps = library(llama, inputs, decoder, eos_token_id=end)
    runs = [transcribed(prompt_of(inputs, row), rule(end)) for row in range(len(LENGTHS))]
    for row, run in enumerate(runs):
        check(run, out[row], steps[row], end)
    assert any(len(run.canvas) < LENGTH for run in runs)
    assert len({len(row) for row in steps.values()}) > 1, "rows are done at different times"


@pytest.mark.parametrize(("commit", "seed"), [("schedule", 1), ("random_commit", 3)])
def test_a_block_that_was_cut_before_it_began_is_paced_as_a_short_one(llama, commit, seed):
    inputs, fewer = prompts(*LENGTHS, seed=seed), 0
    whole, _ = library(llama, inputs, twins(llama, commit, "recompute", 6, 0)[0])
    for end in sorted({token for row in whole for token in row}):
        decoder, transcribed = twins(llama, commit, "recompute", 6, 0, canvas=EndOfText("predicted"))
        out, steps = library(llama, inputs, decoder, eos_token_id=end)
        for row in range(len(LENGTHS)):
            run = transcribed(prompt_of(inputs, row), naive.predicted_end(end))
            check(run, out[row], steps[row], end)
            second = [len(step.committed) for step in run.steps if step.block == 1]
            fewer += len(second) > 1 and second[0] == 1
    assert fewer, "a whole block begins with two commits; some second block must have begun with one"


def test_a_predicted_end_cuts_again_before_one_decided_earlier():
    """Code rule, step by step: what counts is whether an end is decided now, not whether the row has one already."""
    end, tokens = 7, [3, 3, MASK, MASK, MASK, MASK, 7, MASK]
    predicted, confidence = {2: 5, 3: 7, 4: 7, 5: 5, 7: 7}, {2: 0.9, 3: 0.6, 4: 0.7, 5: 0.9, 7: 0.3}
    canvas = Canvas.of(torch.tensor([tokens[:2]]), torch.ones(1, 2), 6, 6, MASK)
    canvas.commit(torch.arange(8)[None] == 6, torch.full((1, 8), 7))
    canvas.advance()
    guesses = torch.full((1, 8), -1), torch.zeros(1, 8, dtype=torch.float64)
    for position, token in predicted.items():
        guesses[0][0, position], guesses[1][0, position] = token, confidence[position]
    rule, cut = EndOfText("predicted"), naive.predicted_end(end)
    for committed, token, last in ((5, 3, 4), (2, 7, 2)):
        tokens[committed] = token
        found = torch.arange(8)[None] == committed
        canvas.commit(found, torch.full((1, 8), token))
        assert cut(tokens, [committed], predicted, confidence, MASK) == last
        assert rule.trim(canvas, torch.tensor([end]), found, guesses).tolist() == [last + 1]
        canvas.advance()


def test_a_filter_takes_places_that_were_cut_off_for_certain():
    net, seen = FILTERS[4], []
    canvas = Canvas.of(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), 4, 4, MASK)
    canvas.cut(torch.tensor([5, 7]), 1)
    confidence = torch.full((2, 4), 0.25, dtype=torch.float64)
    guess = Guess(
        torch.zeros(2, 4, 9), torch.zeros(2, 4).long(), confidence, canvas.masked[:, 3:], torch.ones(2).long()
    )
    hook = net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    chosen = Learn2PD(net, tau=0.3).choose(guess, canvas) & guess.masked
    hook.remove()
    assert seen[0].tolist() == [[0.25, 0.25, 1.0, 1.0], [0.25] * 4]
    for row, block in enumerate(([3, 4], [3, 4, 5, 6])):
        certain = dict.fromkeys(block, 0.25)
        told = naive.learned(net, 4, 0.3)(naive.Seen(block, block, certain, {}, {}, 1))
        assert (chosen[row].nonzero().flatten() + 3).tolist() == told


ELASTIC = [
    {"window": 4, "gamma": 0.85},
    {"window": 6, "gamma": 0.86, "track": 2},
    {"window": 4, "gamma": 0.82, "axis": "keys"},
    {"window": 4, "gamma": 0.88, "far": False},
    {"window": 12, "gamma": 2.0},
    {"window": 5, "gamma": 0.0},
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("options", ELASTIC, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("group", [1, None])
def test_elastic_cache(llama, options, group, shift):
    inputs, epsilon = prompts(*LENGTHS), 0.4
    decoder = Denoise(Threshold(epsilon), ElasticCache(**options, group=group), shift=shift)
    out, steps = library(llama, inputs, decoder)
    runs = [
        naive.elastic(llama, prompt_of(inputs, row), LENGTH, shift, MASK, **options, epsilon=epsilon)
        for row in range(len(LENGTHS))
    ]
    for row, run in enumerate(runs):
        check(run, out[row], steps[row])
    assert sum(step.refreshed for run in runs for step in run.steps) == decoder.stats.whole_layers
    if 0.5 < options["gamma"] < 1:
        later = [step.refreshed for run in runs for step in run.steps[1:]]
        assert min(later) == 0 and max(later) > 0, "a test that never or always fails decides nothing"


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("commit", ["schedule", "factor", "entropy_bound", "random_commit"])
def test_elastic_cache_with_other_commit_rules_and_ends(llama, commit, shift):
    inputs, options = prompts(*LENGTHS), {"window": 5, "gamma": 0.87}
    theirs, refresh = COMMITS[commit], ElasticCache(**options)
    whole = fill(llama, inputs, Denoise(theirs[0](5), refresh, shift=shift), LENGTH).tolist()
    end = max(range(MASK), key=lambda token: sum(token in row[2:-1] for row in whole))
    decoder = Denoise(theirs[0](5), refresh, EndOfText(), shift=shift)
    out, steps = library(llama, inputs, decoder, eos_token_id=end)
    for row, length in enumerate(LENGTHS):
        rules = {"commit": theirs[1](5, length), "cut": naive.decoded_end(end)}
        check(
            naive.elastic(llama, prompt_of(inputs, row), LENGTH, shift, MASK, **options, **rules),
            out[row],
            steps[row],
            end,
        )
    assert len({len(row) for row in steps.values()}) > 1, "rows are done at different times"
