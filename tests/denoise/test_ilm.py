"""ILM against a loop over single insertions in order; batches, gaps, stopping, recording, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from pertoken.core.errors import BadRequest
from pertoken.core.fingerprint import fingerprint
from pertoken.core.trace import Trace, TraceMismatch
from pertoken.denoise.ilm import ILM, INSERT
from pertoken.denoise.insertion import Request, Slots, SlotsModel
from pertoken.models.stack import ModuleStack
from tests.contract.conftest import FAMILIES, VOCABULARY
from tests.denoise.conftest import MASK, prompts

torch.set_num_threads(1)
CLS, PAD, STOP = 1, 0, 1
SPECIALS = {MASK, CLS, PAD, STOP}


def insertion_model(family: str, layers: int = 2, seed: int = 7):
    """A random model that reads both ways and whose stop head is near its threshold."""
    torch.manual_seed(seed)
    model = FAMILIES[family](layers).eval()
    model.config.is_causal, model.config.mask_token_id, model.config.stop_token_id = False, MASK, STOP
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 0.5
    return model


@pytest.fixture(scope="module")
def models():
    return {family: insertion_model(family) for family in ("llama", "qwen3", "mistral", "gemma", "gpt2")}


@pytest.fixture
def model(models):
    return models["llama"]


def gapped(*texts: list[int]):
    """Left-padded inputs of these rows."""
    width = max(map(len, texts))
    ids = torch.tensor([[PAD] * (width - len(t)) + t for t in texts])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])}


def insert(model, inputs, decoder, length=6, **options):
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD} | options
    return model.generate(**inputs, max_new_tokens=length, custom_generate=decoder, **options)


def text(row):
    """A row without padding; no test prompt contains it."""
    return [t for t in row.tolist() if t != PAD]


def forward(model, tokens):
    """Scores `[token, vocabulary]` of one row in order, every token reading every other."""
    with torch.inference_mode():
        mask = torch.zeros(1, 1, len(tokens), len(tokens))
        window = getattr(model.config, "sliding_window", None)
        if window is not None:
            place = torch.arange(len(tokens))
            mask.masked_fill_((place[:, None] - place).abs() >= window, torch.finfo(torch.float32).min)
        return model(torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits[0]


def slots_of(may):
    return [i for i, open_ in enumerate(may) if open_]


def naive(model, prompt, length, decoder):
    """(final text, P(stop) of every step): the paper's inference on one row as lists, greedy."""
    tokens = prompt if prompt[:1] == [CLS] else [CLS, *prompt]
    if MASK not in tokens:
        tokens = [*tokens, MASK]
    may = [t == MASK for t in tokens]
    stops, inserted = [], 0
    while inserted < length:
        scores = forward(model, tokens)
        if getattr(model.config, "stop_at", "cls") == "slots":
            stops.append(math.prod(float(scores[i, model.config.stop_token_id].sigmoid()) for i in slots_of(may)))
        else:
            stops.append(float(scores[0, STOP].sigmoid()))
        if stops[-1] >= decoder.threshold and not (decoder.force_first and inserted == 0):
            break
        best, where = -math.inf, None
        slots = range(len(tokens))
        if decoder.choice == "two_stage":
            allowed = [v for v in range(VOCABULARY) if v not in SPECIALS]
            mass = {i: float(scores[i, allowed].logsumexp(-1)) for i in slots if may[i]}
            slots = [max(mass, key=lambda i: mass[i])]
        for i in slots:
            for v in range(VOCABULARY):
                if may[i] and v not in SPECIALS and float(scores[i, v]) > best:
                    best, where = float(scores[i, v]), (i, v)
        slot, token = where
        tokens.insert(slot + 1, token)
        may.insert(slot + 1, True)
        inserted += 1
    shown = [t for t in tokens if t != MASK]
    return (shown if prompt[:1] == [CLS] else shown[1:]), stops


ROWS = ([5, 6, 7], [9], [4, MASK, 8, 8, 12], [MASK, 3], [CLS, 20, MASK, 21, 22, MASK], [30, 31, 32, 33, 34, 35, 36])


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gpt2"])
@pytest.mark.parametrize("choice", ["joint", "two_stage"])
def test_every_row_is_what_the_definition_gives(models, family, choice):
    model, decoder = models[family], ILM(threshold=0.6, choice=choice)
    with decoder.record() as trace:
        out = insert(model, gapped(*map(list, ROWS)), decoder, length=9)
    lengths, forwards = set(), 0
    for number, prompt in enumerate(ROWS):
        wanted, stops = naive(model, list(prompt), 9, decoder)
        assert text(out[number]) == wanted
        own = [s.note["stop"][s.rows.index(number)] for s in trace.at(INSERT) if number in s.rows]
        assert own == pytest.approx(stops, abs=1e-4)
        lengths.add(len(wanted) - sum(t != MASK for t in prompt))
        forwards += len(stops)
    assert len(lengths) > 1, "rows must stop at different steps for this to say anything"
    assert decoder.stats.row_steps == forwards
    assert decoder.stats.tokens == sum(len(t) for s in trace.at(INSERT) for t in s.note["tokens"])


def test_a_stop_head_that_is_read_at_the_open_slots():
    """P(stop) is the chance that nothing is missing behind any of them."""
    model, decoder = insertion_model("qwen3", seed=9), ILM(threshold=0.5)
    model.config.stop_at, model.config.stop_token_id = "slots", MASK
    with torch.no_grad():
        model.lm_head.weight[MASK] *= 0.5
    with decoder.record() as trace:
        out = insert(model, gapped(*map(list, ROWS)), decoder, length=9)
    found = [naive(model, list(prompt), 9, decoder) for prompt in ROWS]
    for number, (wanted, stops) in enumerate(found):
        assert text(out[number]) == wanted
        own = [s.note["stop"][s.rows.index(number)] for s in trace.at(INSERT) if number in s.rows]
        assert own == pytest.approx(stops, abs=1e-4)
    assert len({len(stops) for _, stops in found}) > 1, "rows must stop at different steps for this to say anything"


def test_the_stop_head_can_be_overruled_at_first_only(model):
    for first in (False, True):
        decoder = ILM(threshold=0.0, force_first=first)
        out = insert(model, gapped([5, MASK, 6]), decoder, length=9)
        assert text(out[0]) == naive(model, [5, MASK, 6], 9, decoder)[0]
        assert (len(text(out[0])), decoder.stats.steps) == ((3, 2) if first else (2, 1))


def request(model, inputs, length):
    model.generation_config.max_new_tokens = length
    try:
        return Request.of(model, inputs["input_ids"], inputs["attention_mask"], model.generation_config, None)
    finally:
        model.generation_config.max_new_tokens = None


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gpt2"])
@pytest.mark.parametrize("plain", [False, True])
def test_stored_out_of_order_is_computed_as_in_order(models, family, plain):
    """Random insertions, several at once: positions are those of a list, scores those of the list's forward."""
    model, generator = models[family], torch.Generator().manual_seed(1)
    asked = request(model, gapped([5, MASK, 6, 7, MASK, 8], [MASK, 9]), 80)
    slots, scorer = Slots.of(asked), SlotsModel(asked)
    if plain:
        scorer.stack = ModuleStack(asked.adapter)
    lists = [[CLS, 5, MASK, 6, 7, MASK, 8], [CLS, MASK, 9]]
    places = [[2, 5], [1]]  # where each open slot stands, in the order in which they are stored
    for _ in range(5):
        chosen = (torch.rand(slots.open.shape, generator=generator) < 0.6) & slots.open
        tokens = torch.randint(2, MASK, chosen.shape, generator=generator)
        for row, (line, stored) in enumerate(zip(lists, places, strict=True)):
            marked = [stored[i] for i in range(len(stored)) if chosen[row, i]]
            added = [int(tokens[row, i]) for i in range(len(stored)) if chosen[row, i]]
            for place, token in sorted(zip(marked, added, strict=True), reverse=True):
                line.insert(place + 1, token)
            moved = lambda p, marked=marked: p + sum(m < p for m in marked)  # noqa: E731
            stored[:] = [moved(p) for p in stored] + [moved(p) + 1 for p in marked]
        slots.insert(chosen, tokens)
        for row, (line, stored) in enumerate(zip(lists, places, strict=True)):
            assert slots.open_positions[row, slots.open[row]].tolist() == stored
            assert slots.given[row, slots.given_valid[row]].tolist() == [
                line[p] for p in slots.given_positions[row, slots.given_valid[row]].tolist()
            ]
    assert any(stored != sorted(stored) for stored in places)
    with torch.inference_mode():
        scores, stop = scorer.forward(slots)
    for row, (line, stored) in enumerate(zip(lists, places, strict=True)):
        wanted = forward(model, line)
        allowed = [v for v in range(VOCABULARY) if v not in SPECIALS]
        torch.testing.assert_close(
            scores[row, slots.open[row]][:, allowed], wanted[stored][:, allowed], atol=1e-4, rtol=1e-4
        )
        assert (scores[row][:, sorted(SPECIALS)] == -torch.inf).all()
        assert float(stop[row]) == pytest.approx(float(wanted[0, STOP].sigmoid()), abs=1e-4)
        shown = [t for t in line if t != MASK][1:]
        assert slots.sequences(torch.tensor([True, True]))[row].tolist() == shown


@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_rebuilds_any_sequence_in_any_order(model, seed):
    """Insert, at random among all right pairs, until the hidden tokens are back; a row grows by one per step."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(2, MASK, (12,), generator=generator).tolist()
    hidden = [(3, 6), (8, 12)]
    prompt = [*whole[:3], MASK, *whole[6:8], MASK]
    slots = Slots.of(request(model, gapped(prompt), 12))
    where = {0: 2, 1: 7}  # open slot -> index in `whole` of the token it stands behind
    left = {i for first, last in hidden for i in range(first, last)}
    while left:
        before = int(slots.size)
        right = [
            (slot, i)
            for slot, behind in where.items()
            for i in left
            if i > behind
            and not any(behind < other <= i for other in where.values())
            and any(first <= i < last and behind >= first - 1 for first, last in hidden)
        ]
        slot, i = right[int(torch.randint(len(right), (), generator=generator))]
        chosen = torch.zeros_like(slots.open)
        chosen[0, slot] = True
        slots.insert(chosen, torch.full_like(slots.open_positions, whole[i]))
        where[len(where)] = i
        left.remove(i)
        assert int(slots.size) == before + 1
    assert slots.sequences(torch.tensor([True]))[0].tolist() == whole


def test_prompts_never_change_and_nothing_is_inserted_outside_a_gap(model):
    torch.manual_seed(0)
    inputs = gapped([5, 6, MASK, 7, 8], [9, MASK, 10, MASK, 11], [12, 13])
    for _ in range(5):
        out = insert(model, inputs, ILM(threshold=2.0), length=7, do_sample=True, temperature=2.0)
        rows = [text(row) for row in out]
        assert rows[0][:2] == [5, 6] and rows[0][-2:] == [7, 8] and len(rows[0]) == 11
        assert rows[1][0] == 9 and rows[1][-1] == 11 and 10 in rows[1][1:-1] and len(rows[1]) == 10
        assert out[2, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"][2]) and len(rows[2]) == 9
        assert not SPECIALS & {token for row in rows for token in row}


@pytest.mark.parametrize("options", [{}, {"choice": "two_stage"}, {"parallel": 0.05}, {"force_first": True}], ids=str)
def test_a_row_does_not_depend_on_its_batch(model, options):
    decoder = ILM(**{"threshold": 0.6} | options)
    together = insert(model, gapped(*map(list, ROWS)), decoder, length=9)
    order = [3, 0, 5, 2, 4, 1]
    permuted = insert(model, gapped(*[list(ROWS[i]) for i in order]), decoder, length=9)
    assert len({len(text(row)) for row in together}) > 1
    for number, prompt in enumerate(ROWS):
        alone = text(insert(model, gapped(list(prompt)), decoder, length=9)[0])
        assert alone == text(together[number]) == text(permuted[order.index(number)])


def test_a_row_that_stopped_never_changes_again_and_leaves_the_batch(model):
    decoder = ILM(threshold=0.6)
    with decoder.record() as trace:
        insert(model, gapped(*map(list, ROWS)), decoder, length=9)
    steps = list(trace.at(INSERT))
    seen_last = {row: max(n for n, s in enumerate(steps) if row in s.rows) for row in range(len(ROWS))}
    assert len(set(seen_last.values())) > 1
    for number, step in enumerate(steps):
        assert list(step.rows) == [row for row in range(len(ROWS)) if seen_last[row] >= number]
        for row, tokens, stop in zip(step.rows, step.note["tokens"], step.note["stop"], strict=True):
            assert (len(tokens) == 0) == (stop >= 0.6)
            assert (len(tokens) == 0) <= (seen_last[row] == number)
    assert decoder.stats.token_forwards < len(ROWS) * decoder.stats.steps * 20


@pytest.mark.parametrize("parallel", [None, 0.05])
def test_a_recording_says_when_each_token_of_the_finished_text_was_inserted(model, parallel):
    from pertoken.view.fills import fills

    decoder = ILM(threshold=0.6, parallel=parallel)
    with decoder.record() as trace:
        outs = insert(model, gapped(*map(list, ROWS)), decoder, length=9)
    found = fills(trace)
    assert len(found) == len(ROWS) and sum(len(set(fill.committed.tolist())) > 3 for fill in found) > 1
    for fill, out, prompt in zip(found, outs, ROWS, strict=True):
        given = iter(token for token in prompt if token not in (CLS, MASK))
        drawn = [next(given) if known else token for known, token in zip(fill.given, fill.tokens, strict=True)]
        assert drawn == [token for token in text(out) if token != CLS] and next(given, None) is None


def test_parallel_insertion_fills_gaps_that_are_not_neighbours(model):
    prompt = [5, MASK, 6, MASK, 7, MASK, 8, MASK]
    one, many = ILM(threshold=2.0), ILM(threshold=2.0, parallel=0.02)
    single = insert(model, gapped(prompt), one, length=8)
    with many.record() as trace:
        several = insert(model, gapped(prompt), many, length=8)
    assert len(text(single[0])) == len(text(several[0])) == 12
    assert many.stats.steps < one.stats.steps == 8
    for step in trace.at(INSERT):
        columns = step.decision.keep[0].nonzero().flatten()
        assert (columns.diff() > 1).all() and step.decision.valid[0, columns].all()
    assert insert(model, gapped(prompt), ILM(threshold=2.0, parallel=1.0), length=8).equal(single)


def test_parallel_insertion_takes_what_is_sure_and_as_good_as_the_best(model):
    """Scores by hand: slots at positions 1, 3, 4, 6; pairs of a sure slot, a weaker one, a neighbour, an unsure one."""
    from pertoken.denoise.ilm import _Run

    asked = request(model, gapped([MASK, 5, MASK, MASK, 6, MASK]), 9)
    run = _Run(ILM(parallel=0.5), asked, ())
    scores = torch.full((1, 4, VOCABULARY), -20.0)
    scores[0, 0, 7], scores[0, 1, 8], scores[0, 2, 9], scores[0, 3, 10] = 3.0, 2.7, 2.8, 2.9
    chosen, tokens = run._choose(scores.clone())
    assert chosen.tolist() == [[True, False, True, True]] and tokens[0, chosen[0]].tolist() == [7, 9, 10]
    scores[0, 3, 11:13] = 2.9
    assert run._choose(scores.clone())[0].tolist() == [[True, False, True, False]], "an unsure slot waits"
    scores[0, 3, 12] = 3.1
    chosen, tokens = run._choose(scores.clone())
    assert chosen.tolist() == [[True, False, True, True]] and int(tokens[0, 3]) == 12, "unless it has the best pair"
    scores[0, 3, 12] = 2.9
    scores[0, 2, 9] = 2.0
    assert run._choose(scores.clone())[0].tolist() == [[True, True, False, False]], "a weak slot waits"
    full = _Run(ILM(parallel=0.5), request(model, gapped([MASK, 5, MASK, MASK, 6, MASK]), 1), ())
    assert full._choose(scores.clone())[0].tolist() == [[True, False, False, False]], "one insertion is left"


@pytest.mark.parametrize("options", [{}, {"parallel": 0.05}, {"choice": "random"}], ids=str)
def test_a_recording_replays_without_the_model_or_the_seed(model, options, tmp_path):
    inputs, decoder = gapped(*map(list, ROWS)), ILM(**{"threshold": 0.6} | options)
    torch.manual_seed(1)
    with decoder.record() as trace:
        first = insert(model, inputs, decoder, length=9, do_sample=True)
    trace.save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    with decoder.replay(loaded), decoder.record() as again:
        assert insert(model, inputs, decoder, length=9).equal(first)
    assert again.same_as(trace) and decoder.stats.token_forwards == 0
    with decoder.replay(loaded), pytest.raises(TraceMismatch, match="replay with the inputs"):
        insert(model, gapped([5, 6, 7], [9]), decoder, length=9)


def test_sampling_depends_on_the_seed_alone(model):
    inputs, outs = gapped(*map(list, ROWS)), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(insert(model, inputs, ILM(threshold=2.0), do_sample=True, top_k=0))
    assert outs[0].equal(outs[1]) and not outs[0].equal(outs[2])


@pytest.mark.parametrize(("choice", "greedy"), [("joint", False), ("two_stage", False), ("two_stage", True)])
def test_sampled_pairs_have_the_models_law(model, choice, greedy):
    prompt = [5, MASK, 6, MASK]
    scores = forward(model, [CLS, *prompt])[[2, 4]]
    scores[:, sorted(SPECIALS)] = -torch.inf
    law = scores.flatten().softmax(-1).view_as(scores).double()
    if greedy:
        best = scores.logsumexp(-1).argmax()
        law = torch.zeros_like(law)
        law[best] = scores[best].double().softmax(-1)
    inputs = {name: value.expand(800, -1) for name, value in gapped(prompt).items()}
    torch.manual_seed(0)
    decoder = ILM(threshold=2.0, choice=choice, greedy_gap=greedy)
    out = insert(model, inputs, decoder, length=1, do_sample=True, top_k=0)
    found = torch.zeros_like(law)
    for row in out.tolist():
        left = row[1] != 6
        assert len(row) >= 3 and (row[0], row[2] if left else row[1]) == (5, 6)
        found[(0, row[1]) if left else (1, row[2])] += 1 / len(out)
    for pair in law.flatten().topk(4).indices.tolist():
        p = float(law.flatten()[pair])
        assert abs(float(found.flatten()[pair]) - p) < 4 * math.sqrt(p * (1 - p) / len(out)) + 1e-9


def test_top_k_acts_on_pairs_or_on_tokens(model):
    prompt = [5, MASK, 6, MASK]
    scores = forward(model, [CLS, *prompt])[[2, 4]]
    scores[:, sorted(SPECIALS)] = -torch.inf
    inputs = {name: value.expand(60, -1) for name, value in gapped(prompt).items()}
    torch.manual_seed(0)
    pairs = insert(model, inputs, ILM(threshold=2.0), length=1, do_sample=True, top_k=1)
    greedy = insert(model, inputs, ILM(threshold=2.0), length=1)
    assert pairs.equal(greedy)
    tokens = insert(model, inputs, ILM(threshold=2.0, choice="two_stage"), length=1, do_sample=True, top_k=1)
    assert len({tuple(row) for row in tokens.tolist()}) == 2, "the likeliest token of either slot"


def test_processors_of_the_vocabulary_act_before_the_place_is_chosen(model):
    prompt = [5, MASK, 6, MASK]
    scores = forward(model, [CLS, *prompt])[[2, 4]]
    scores[:, sorted(SPECIALS)] = -torch.inf
    best = scores.logsumexp(-1).argmax()
    common = scores[best].topk(8).indices.tolist()
    scores[:, common] = -torch.inf
    out = insert(model, gapped(prompt), ILM(threshold=2.0, choice="two_stage"), 1, suppress_tokens=common)
    slot = int(scores.logsumexp(-1).argmax())
    wanted = [5, 6]
    wanted.insert(slot + 1, int(scores[slot].argmax()))
    assert text(out[0]) == wanted


def test_the_control_chooses_any_open_slot(model):
    inputs = {name: value.expand(300, -1) for name, value in gapped([5, MASK, 6, MASK]).items()}
    torch.manual_seed(0)
    out = insert(model, inputs, ILM(threshold=2.0, choice="random"), length=1)
    assert abs(float((out[:, 1] != 6).float().mean()) - 0.5) < 0.12
    assert len({tuple(row) for row in out.tolist()}) == 2, "tokens are still the likeliest"


def test_an_empty_prompt_is_a_gap_after_cls(model):
    empty = {"input_ids": torch.tensor([[PAD, PAD], [5, 6]]), "attention_mask": torch.tensor([[0, 0], [1, 1]])}
    out = insert(model, empty, ILM(threshold=2.0), length=4)
    wanted, _ = naive(model, [], 4, ILM(threshold=2.0))
    assert out[0].tolist() == [PAD, PAD, *wanted]
    begun = insert(model, gapped([CLS]), ILM(threshold=2.0), length=4)
    assert begun[0].tolist() == [CLS, *wanted]


def test_the_model_is_left_as_it_was_and_half_precision_runs(model):
    before = fingerprint(model, deep=True)
    insert(model, gapped(*map(list, ROWS)), ILM(threshold=0.6))
    assert fingerprint(model, deep=True) == before
    half = insertion_model("llama").to(torch.bfloat16)
    out = insert(half, gapped(*map(list, ROWS)), ILM(threshold=2.0), length=4, return_dict_in_generate=True)
    assert [len(text(row)) for row in out.sequences] == [sum(t != MASK for t in p) + 4 for p in ROWS]


class Never(StoppingCriteria):
    def __call__(self, ids, scores, **_):
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 300}, "lower max_new_tokens to 249"),
        ({"decoder": {"mask_token": 500}}, "500 is not in the vocabulary"),
        ({"stopping_criteria": StoppingCriteriaList([Never()])}, "Never"),
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor asks for the text"),
        ({"suppress_tokens": list(range(VOCABULARY))}, "row 0 has no finite scores"),
    ],
)
def test_bad_requests_say_what_is_wrong(model, options, says):
    options = dict(options)
    decoder = ILM(**{"threshold": 2.0} | options.pop("decoder", {}))
    with pytest.raises(BadRequest, match=says):
        insert(model, prompts(5), decoder, **options)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("is_causal", True, r"is causal.*zoo:code-insertion"),
        ("stop_token_id", None, "no stop head"),
        ("mask_token_id", None, "gap marker"),
        ("bos_token_id", None, "CLS"),
        ("stop_at", "end", "stop_at='end' is unknown"),
    ],
)
def test_a_model_that_cannot_insert_is_refused(model, name, value, says):
    kept = getattr(model.config, name, "cls")
    setattr(model.config, name, value)
    try:
        with pytest.raises(BadRequest, match=says):
            insert(model, prompts(5), ILM())
    finally:
        setattr(model.config, name, kept)


def test_other_refusals(model):
    with pytest.raises(BadRequest, match="choice='best'"):
        ILM(choice="best")  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="parallel=0"):
        ILM(parallel=0)
    right = {name: value.flip(-1) for name, value in prompts(5, 3).items()}
    with pytest.raises(BadRequest, match="row 1 is padded on the right"):
        insert(model, right, ILM())


def test_nan_logits_are_named():
    model = insertion_model("llama")
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(BadRequest, match="not finite"):
        insert(model, prompts(5), ILM(threshold=2.0))
