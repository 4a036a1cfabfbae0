"""DMA against its definition, one query and head at a time: forward, gradients, ties, causality, chunks, padding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from pertoken.attend.dma import DMA, Known
from pertoken.attend.dma_layer import DynamicMaskAttention
from pertoken.attend.dynamic_mask import DynamicMask
from pertoken.attend.selection import KeyView, attended
from pertoken.attend.sight import Causal
from pertoken.core.attach import UndoError, attach
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace
from pertoken.decode.dyspec import DySpec
from pertoken.decode.full import Full
from tests.attend.test_selection import VOCABULARY, llama, logits

torch.set_num_threads(1)
SCALE = 0.4


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded random rows, in which tokens stand several times."""
    generator = torch.Generator().manual_seed(seed)
    widest = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), widest), generator=generator)
    mask = torch.stack([torch.arange(widest) >= widest - n for n in lengths]).long()
    return ids * mask, mask


def graded(z: float) -> float:
    """z to 12 bits after the point of its mantissa."""
    mantissa, exponent = math.frexp(abs(z))
    return math.copysign(math.floor(mantissa * 2**13 + 0.5) * 2.0 ** (exponent - 13), z)


def read_by(z: list[float], seen: list[int], policy: DMA) -> list[int]:
    """Which of the columns `seen`, the last of which is the query's own, it reads, by the words of the docstring."""
    near = max(policy.recent, 1)
    always = [*seen[: policy.sinks], *seen[len(seen) - near :]] if near < len(seen) else seen
    between = [j for j in seen if j not in always]
    limit = len(between)
    if policy.budget.tokens is not None:
        limit = policy.budget.tokens
    if policy.budget.fraction is not None:
        limit = math.ceil(round(policy.budget.fraction * len(between), 6))
    return sorted({*always, *sorted(between, key=lambda j: (-graded(z[j]), -j))[:limit]})


def by_hand(query, key, value, weight, a, valid, first, policy: DMA) -> Tensor:
    """Attention `[batch, heads, query, dim]` of the queries at columns from `first` on."""
    mask = policy.mask
    assert isinstance(mask, DynamicMask)
    rows, heads, queries, dim = query.shape
    each = heads // key.shape[1]
    out = []
    for row in range(rows):
        for head in range(heads):
            group = head // each
            z = [
                a[group] * torch.nn.functional.softplus((weight[group] * value[row, :, j].flatten()).sum())
                for j in range(key.shape[2])
            ]
            for q in range(queries):
                if not valid[row, first + q]:
                    out.append(torch.zeros(dim))
                    continue
                seen = [j for j in range(first + q + 1) if valid[row, j]]
                read = read_by([float(one.detach()) for one in z], seen, policy)
                scores = []
                for j in read:
                    delta = z[j] if mask.form == "softplus" else torch.exp(torch.clamp(z[j], max=mask.clamp))
                    scores.append((query[row, head, q] * key[row, group, j]).sum() * SCALE + delta)
                law = torch.stack(scores).softmax(0)
                out.append((law[:, None] * value[row, group, read]).sum(0))
    return torch.stack(out).view(rows, heads, queries, dim)


def by_runs(query, key, value, valid, first, policy: DMA) -> Tensor:
    sight = Causal(valid, first, query.shape[2], lambda: None)
    runs = sight.runs(policy.run)
    view = KeyView(
        valid=sight.real, layers=1, queries=runs.split(query), keys=key, values=value, runs=runs,
        kept=runs.kept(policy.sinks, policy.recent, policy.each), scale=SCALE,
    )  # fmt: skip
    return runs.join(attended(policy, view, policy.decide(view), view.queries))


BUDGETS = st.one_of(
    st.integers(0, 9).map(lambda n: Budget(tokens=n)),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]).map(lambda f: Budget(fraction=f)),
    st.just(Budget.full()),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    BUDGETS,
    st.integers(0, 2),
    st.integers(0, 4),
    st.integers(1, 7),
    st.sampled_from(["softplus", "exp"]),
    st.sampled_from([0.0, 1.0, 20.0]),
    st.lists(st.integers(1, 15), min_size=1, max_size=2),
    st.integers(0, 9),
    st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    st.booleans(),
    st.integers(0, 99),
)
def test_forward_and_gradients_are_those_of_the_definition(
    budget, sinks, recent, run, form, noise, lengths, before, heads, even, seed
):
    kv_heads, each = heads
    torch.manual_seed(seed)
    mask = DynamicMask([0], kv_heads, 4, form=form, noise=noise, seed=seed)
    policy = DMA(budget, sinks, recent, run, mask=mask)
    keys = max(lengths)
    first = min(before, keys - 1)
    draw = lambda *shape: torch.randn(shape)  # noqa: E731
    query, key = draw(len(lengths), kv_heads * each, keys - first, 4), draw(len(lengths), kv_heads, keys, 4)
    value = draw(len(lengths), kv_heads, keys, 4)
    if even:  # the same few values again and again
        value = value[:, :, torch.randint(0, min(3, keys), (keys,))]
    valid = torch.stack([torch.arange(keys) >= keys - n for n in lengths])
    found = []
    for wanted in (False, True):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        if wanted:
            leaves += [mask.scorer(0).weight.detach().clone().requires_grad_()]
            leaves += [mask.scorer(0).A.detach().clone().requires_grad_()]
            out = by_hand(*leaves, valid, first, policy)
        else:
            mask.zero_grad()
            out = by_runs(*leaves, valid, first, policy)
            leaves += [mask.scorer(0).weight, mask.scorer(0).A]
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        found.append((out, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]))
    (mine, my_grads), (out, grads) = found
    assert torch.allclose(mine, out, atol=1e-5)
    for one, other in zip(my_grads, grads, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


def test_gradient_reaches_the_mask_through_the_bias_only():
    torch.manual_seed(0)
    mask = DynamicMask([0], 2, 4, noise=1.0)
    policy = DMA(Budget(tokens=3), run=4, mask=mask)
    query, key, value = torch.randn(1, 4, 1, 4), torch.randn(1, 2, 12, 4), torch.randn(1, 2, 12, 4)
    leaves = [x.requires_grad_() for x in (key, value)]
    valid = torch.ones(1, 12, dtype=torch.bool)
    by_runs(query, key, value, valid, 11, policy).square().sum().backward()
    assert mask.scorer(0).weight.grad.abs().sum() > 0 and mask.scorer(0).A.grad.abs().sum() > 0  # type: ignore[union-attr]
    for leaf in leaves:
        assert leaf.grad is not None
        touched = (leaf.grad.abs().sum(-1) > 0).sum(-1)
        assert (touched <= 8).all() and (touched >= 4).all()  # 4 for each head; values are also in the other's delta


@pytest.mark.parametrize("run", [1, 3, 64])
@pytest.mark.parametrize("settings_", [{}, {"sinks": 1, "recent": 3}], ids=["plain", "sinks and recent"])
@pytest.mark.parametrize("budget", [Budget(tokens=4), Budget(fraction=0.4)], ids=str)
def test_a_prefill_is_token_by_token_and_does_not_depend_on_the_run(run, settings_, budget):
    model = llama(3)
    ids, mask = batch([19, 11])
    policy = DMA.for_model(model, noise=2.0, budget=budget, run=run, **settings_)
    other = DMA(budget, run=5, mask=policy.mask, **settings_)
    with attach(model, policy):
        whole, cache, parts = logits(model, ids, mask), DynamicCache(), []
        for at in range(19):
            parts.append(logits(model, ids[:, at : at + 1], mask[:, : at + 1], past_key_values=cache))
    with attach(model, other):
        again = logits(model, ids, mask)
    real = mask.bool()
    assert torch.allclose(torch.cat(parts, 1)[real], whole[real], atol=1e-4)
    assert torch.allclose(again[real], whole[real], atol=1e-4)
    assert not torch.allclose(whole[real], logits(model, ids, mask)[real], atol=1e-2)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", ["none", "2-D", "padded"])
@pytest.mark.parametrize("learning", [False, True])
def test_what_comes_later_changes_nothing_before(kind, masked, learning):
    model = llama(2, attn_implementation=kind).train(learning)
    ids, mask = batch([22])
    if masked == "padded":
        ids, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    policy = DMA.for_model(model, noise=2.0, budget=Budget(tokens=4), run=4)
    more = {} if masked == "none" else {"attention_mask": mask}
    with attach(model, policy), torch.set_grad_enabled(learning):
        before = model(ids, **more).logits
        for at in range(ids.shape[1] - 22 + 1, ids.shape[1], 5):
            changed = ids.clone()
            changed[:, at] = (changed[:, at] + 7) % 50 + 2
            after = model(changed, **more).logits
            assert torch.allclose(after[:, :at], before[:, :at], atol=1e-6)
            assert not torch.allclose(after[:, at:], before[:, at:], atol=1e-3)


@pytest.mark.parametrize("form", ["softplus", "exp"])
@pytest.mark.parametrize("learning", [False, True])
def test_where_all_fits_and_a_is_zero_it_is_the_model_as_it_was(form, learning):
    model = llama(2)
    ids, mask = batch([17, 9])
    dense, real = logits(model, ids, mask), mask.bool()
    for budget in (Budget(tokens=17), Budget(fraction=1.0), Budget(tokens=4)):
        policy = DMA.for_model(model, form=form, noise=0.0, budget=budget, run=5)
        with attach(model, policy), torch.set_grad_enabled(learning):
            out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        same = torch.allclose(out[real], dense[real], atol=1e-5)
        assert same is (budget.tokens != 4)
    with attach(model, DMA.for_model(model, form=form, noise=1.0, budget=Budget(tokens=17))):
        assert not torch.allclose(logits(model, ids, mask)[real], dense[real], atol=1e-3)


def test_even_keys_are_a_window_of_the_last_ones():
    model = llama(1)
    ids, mask = batch([12, 7])
    for policy in (DMA(Budget(tokens=3), run=1), DMA.for_model(model, noise=0.0, budget=Budget(tokens=3), run=1)):
        trace = Trace()
        with attach(model, policy, trace=trace):
            logits(model, ids, mask)
        index = trace.steps[0].decision.index
        for row, length in enumerate((12, 7)):
            for at in range(length):
                wanted = set(range(max(at - 3, 0), at + 1))
                assert {c - 12 + length for c in index[row, 0, at].tolist() if c >= 0} == wanted


def test_a_padded_batch_is_each_row_alone():
    model = llama(3)
    lengths = [23, 4, 15, 1]
    ids, mask = batch(lengths)
    policy = DMA.for_model(model, noise=2.0, budget=Budget(tokens=5), run=4)
    with attach(model, policy):
        found = logits(model, ids, mask)
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 23:]
        for row, length in enumerate(lengths):
            alone = ids[row : row + 1, -length:]
            ones = torch.ones_like(alone)
            assert torch.allclose(found[row, -length:], logits(model, alone, ones)[0], atol=1e-4)
            again = model.generate(alone, attention_mask=ones, max_new_tokens=8, do_sample=False)[0, length:]
            assert torch.equal(again, generated[row])


@pytest.mark.parametrize("decoder", [Full(), "dyspec"])
def test_nodes_of_a_token_tree_choose_for_themselves(decoder):
    model = llama(3)
    ids, mask = batch([17, 9, 12])
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    made = DySpec(llama(1), size=6) if decoder == "dyspec" else decoder
    with attach(model, DMA.for_model(model, noise=2.0, budget=Budget(tokens=4), sinks=1, recent=2, run=4)):
        wanted = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, custom_generate=made, **options), wanted)
    assert not torch.equal(model.generate(ids, **options), wanted)


def test_each_query_reads_its_budget_and_itself(monkeypatch):
    model = llama(2)
    ids, mask = batch([26, 17])
    read: list[Tensor] = []
    weigh = DMA.weigh

    def spy(self, view, index):
        more, bias = weigh(self, view, index)
        reads = view.runs.sight.reads(view.runs.slots, index)
        read.append((reads if more is None else reads & more).sum(-1))
        return more, bias

    monkeypatch.setattr(DMA, "weigh", spy)
    with attach(model, DMA.for_model(model, noise=1.0, budget=Budget(tokens=6), run=5)):
        logits(model, ids, mask)
    assert len(read) == 2
    for counts in read:
        assert counts.shape[1] == 2
        for row, length in enumerate((26, 17)):
            wanted = torch.arange(1, length + 1).clamp(max=7)
            assert (counts[row].flatten(1)[:, :length] == wanted).all()


@pytest.mark.parametrize("form", ["softplus", "exp"])
@pytest.mark.parametrize("sign", [1, -1])
def test_half_precision_with_large_a_is_finite(form, sign):
    model = llama(2).to(torch.bfloat16).train()
    ids, mask = batch([30, 11])
    policy = DMA.for_model(model, form=form, budget=Budget(tokens=4), run=4)
    assert isinstance(policy.mask, DynamicMask)
    for layer in policy.mask.layers:
        policy.mask.scorer(layer).A.data.fill_(sign * 1e4)
    with attach(model, policy):
        out = model(ids, attention_mask=mask).logits
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    for weight in (*policy.parameters(), *model.parameters()):
        assert weight.grad is None or weight.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """Of all tensors that are made inside: how many elements the largest has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor) and made.untyped_storage().nbytes() >= made.numel() * made.element_size():
                self.numel = max(self.numel, made.numel())
        return out


def test_nothing_of_the_size_query_by_key_forward_or_backward():
    model = llama(1).train()
    length = 512
    ids, mask = batch([length])
    policy = DMA.for_model(model, noise=1.0, budget=Budget(tokens=16), run=16)
    with attach(model, policy), Largest() as largest:
        model(ids, attention_mask=mask).logits.sum().backward()
    assert length * 32 < largest.numel < length * length
    with Largest() as dense:
        llama(1, attn_implementation="eager")(ids, attention_mask=mask)
    assert dense.numel >= length * length


def test_training_the_mask_and_the_model(tmp_path):
    model = llama(2).train()
    ids, mask = batch([24, 24, 24, 24])
    policy = DMA.for_model(model, noise=0.0, budget=Budget(tokens=6), run=8)
    frozen = copy.deepcopy(model.state_dict())
    losses = []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, weight_decay=0.0)
    with attach(model, policy):
        for _ in range(12):
            loss = model(ids, attention_mask=mask, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.state_dict().items())
    assert isinstance(policy.mask, DynamicMask)
    assert all(policy.mask.scorer(layer).A.abs().sum() > 0 for layer in (0, 1))
    policy.mask.save(tmp_path / "dynamic_mask.safetensors")
    model.eval()
    outs = []
    paths = (tmp_path, tmp_path / "dynamic_mask.safetensors")
    for mine in (policy, *(DMA(policy.budget, run=8, mask=path) for path in paths)):
        with attach(model, mine):
            outs.append(logits(model, ids, mask))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    with pytest.raises(UndoError, match="weight"):
        step(model, policy, ids, mask, training=False)
    step(model, policy, ids, mask, training=True)


def step(model, policy, ids, mask, training):
    optimizer = torch.optim.SGD([*model.parameters(), *policy.parameters()], lr=0.01)
    with attach(model, policy, training=training):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()


def test_what_is_kept_between_steps_changes_nothing(monkeypatch):
    model = llama(3)
    ids, mask = batch([18, 12, 7])
    policy = DMA.for_model(model, noise=2.0, budget=Budget(tokens=4))
    served = []
    serves = Known.serves

    def spy(self, *given):
        served.append(serves(self, *given))
        return served[-1]

    outs = []
    for kept in (spy, lambda *_: False):
        monkeypatch.setattr(Known, "serves", kept)
        with attach(model, policy):
            outs.append(
                [
                    model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, num_beams=beams, **more)
                    for beams, more in ((1, {}), (3, {}), (1, {"cache_implementation": "static"}))
                ]
            )
    assert sum(served) > 20 and not all(served)  # beams change places
    for one, other in zip(*outs, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(outs[0][0], outs[0][2])


@pytest.mark.parametrize("settings_", [{}, {"sinks": 1, "recent": 2, "form": "exp"}], ids=["plain", "exp"])
def test_the_layer_alone(settings_):
    torch.manual_seed(0)
    layer = DynamicMaskAttention(16, 4, 2, budget=Budget(tokens=3), run=4, noise=1.0, **settings_)
    hidden, valid = torch.randn(2, 15, 16), torch.arange(15) >= torch.tensor([[0], [6]])
    out, _ = layer(hidden, valid)
    parts, past = [], None
    for at in range(15):
        part, past = layer(hidden[:, at : at + 1], valid[:, at : at + 1], past)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), out, atol=1e-5) and not out[~valid].any()
    with torch.no_grad():
        past, parts = None, []
        for at in range(0, 15, 5):
            part, past = layer(hidden[:, at : at + 5], valid[:, at : at + 5], past)
            parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), out, atol=1e-5)
    assert torch.allclose(layer(hidden[1:, 6:])[0], out[1:, 6:], atol=1e-5)
    changed = hidden.clone()
    changed[:, 9] += 1
    assert torch.allclose(layer(changed, valid)[0][:, :9], out[:, :9], atol=1e-6)
    out.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in layer.parameters())
    twin = copy.deepcopy(layer)
    twin.mask.scorer(0).A.data.zero_()
    assert not torch.allclose(twin(hidden, valid)[0], out, atol=1e-4) and twin.policy.mask is twin.mask


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path):
    model = llama(2)
    wrong = DMA(mask=DynamicMask([0], 2, 4))
    with pytest.raises(BadRequest, match=r"was made for 2 key heads of 4 in layers \[0\]"), attach(model, wrong):
        pass
    with pytest.raises(BadRequest, match="positions"):
        DMA(positions="compact")
    with pytest.raises(BadRequest, match="form='relu' is unknown"):
        DMA.for_model(model, form="relu")
    with pytest.raises(BadRequest, match="no dynamic mask at"), attach(model, DMA(mask=tmp_path / "none.safetensors")):
        pass
    with pytest.raises(BadRequest, match="holds no parameters yet"):
        DMA().parameters()
    with pytest.raises(BadRequest, match="multiple of kv_heads"):
        DynamicMaskAttention(16, 4, 3)
    with attach(model, DMA()) as attached:
        assert isinstance(attached.policy, DMA) and len(list(attached.policy.parameters())) == 4
