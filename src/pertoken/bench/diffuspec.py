"""Claims of DiffuSpec: exact at any temperature, and more guesses accepted with its search and its adaptive length.

*Tests*: the zoo's diffusion model drafts for its autoregressive twin, which writes unit tests as it does. *Code*: it
drafts for the code model on held-out files, a target that it agrees with less.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pertoken.bench import diffusion, suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.exactness import claim_identical, claim_laws
from pertoken.decode.chain import Chain
from pertoken.decode.diffuspec import DiffuSession, DiffuSpec
from pertoken.decode.ngram import NGramCounts
from pertoken.decode.request import Request
from pertoken.decode.speculation import Proposal, Session
from pertoken.models.context import Context

LENGTHS = (5, 10, 20, 30)


def drafter(bench: Bench) -> Any:
    return diffusion.loaded(bench).model


def filler(models: suite.Pair) -> Any:
    """The draft of a pair, or a model like it, reading both ways, with a mask token behind the target's vocabulary."""
    vocabulary = models.target.config.vocab_size
    config = copy.deepcopy(models.draft.config)
    config.vocab_size, config.is_causal, config.mask_token_id, config.prediction_shift = (
        vocabulary + 1,
        False,
        vocabulary,
        1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = type(models.draft)(config).eval()
    known = {k: v for k, v in models.draft.state_dict().items() if v.shape == model.state_dict()[k].shape}
    model.load_state_dict(known, strict=False)
    return model


def identical(bench: Bench, batch: int) -> Measurement:
    return suite.identical(bench, lambda models: DiffuSpec(drafter(bench)), batch)


claim_identical("diffuspec", ", one at a time", partial(identical, batch=1))
claim_identical("diffuspec", ", in ragged batches of 8", partial(identical, batch=8), shown=True)
claim_laws("diffuspec", {"It": lambda models: DiffuSpec(filler(models))}, (0.6, 1.0, 1.5))


@dataclass(frozen=True)
class AsDrawn(DiffuSpec):
    """The control that must fail: the first token of the path found, verified as if it were a draw."""

    def session(self, request: Request, target: Context, scope: Any) -> Session:
        found = super().session(request, target, scope)
        assert isinstance(found, DiffuSession)
        return DrawnSession(found.settings, request, found.drafter, target.stack.adapter.vocabulary)


class DrawnSession(DiffuSession):
    """Gives the drafter's law for the first token of every path."""

    def propose(self) -> Proposal:
        proposal = super().propose()
        laws = self.drafter.read(self.request.active, [1 for _ in self.request.active])[:, 0].exp()
        for row, tree in enumerate(proposal.trees):
            tree.sure = [i > 0 for i in range(len(tree))]
            proposal.laws[row] = {-1: laws[row]} if len(tree) else {}
        return proposal


@claim(
    "diffuspec",
    claim="Control: the path found, verified by the paper's ratio rule, does not have the target's law",
    metric="p-value of a chi-square test over 125 outcomes",
    expected="< 0.001",
    compare="value",
)
def ratio_rule_fails(bench: Bench) -> Measurement:
    return suite.law_test(bench, lambda models: AsDrawn(filler(models)), 1.0)


@dataclass(frozen=True)
class Counted:
    """tokens per row and target step, and guesses per step, over a task."""

    rate: float
    drafted: float
    n: int


def counted(bench: Bench, kind: str, label: str, make: Any) -> Counted:
    """Greedy, in batches of 8; make(target, causal draft or None)."""

    def measure() -> Counted:
        if kind == "tests":
            about, length = diffusion.loaded(bench, name=diffusion.TWIN), 64
            texts, target, draft = list(diffusion.unit_tests(bench, 48, 8).prompts), about.model, None
        else:
            about, length = suite.pair(bench), 32 if bench.quick else 64
            texts, target, draft = suite.texts(bench, 48, 8), about.target, about.draft
        decoder, tokens, steps, drafted = make(target, draft), 0, 0, 0
        for part in suite.chunks(texts, 8):
            suite.generate(target, about.batch(part), length, decoder)
            tokens, steps = tokens + decoder.stats.tokens, steps + decoder.stats.row_steps
            drafted += decoder.stats.drafted
        return Counted(tokens / steps, drafted / steps, len(texts))

    return bench.shared(("diffuspec", kind, label), measure)


def ours(bench: Bench, kind: str, label: str, **options: Any) -> Counted:
    return counted(bench, kind, label, lambda target, draft: DiffuSpec(drafter(bench), **options))


METRIC = "tokens per row and target step"


@claim(
    "diffuspec",
    claim="Writing unit tests for the twin, adaptive length accepts more than fixed ones of at most as many guesses",
    metric=METRIC,
    expected="> 1",
    shown=True,
)
def beats_fixed_length(bench: Bench) -> Measurement:
    mine = ours(bench, "tests", "adaptive")
    fixed = {k: ours(bench, "tests", f"fixed {k}", shortest=k, longest=k) for k in LENGTHS}
    fair = {k: one for k, one in fixed.items() if one.drafted <= mine.drafted} or {LENGTHS[0]: fixed[LENGTHS[0]]}
    best = max(fair, key=lambda k: fair[k].rate)
    detail = {
        "guesses per step": mine.drafted,
        "fixed (rate, guesses)": {k: (o.rate, o.drafted) for k, o in fixed.items()},
    }
    return Measurement(mine.rate, f"fixed length {best}", fair[best].rate, mine.n, detail)


@claim(
    "diffuspec",
    claim="Writing unit tests for the twin, the path found accepts more than the most likely token of each position",
    metric=METRIC,
    expected="> 1",
    shown=True,
)
def search_helps(bench: Bench) -> Measurement:
    mine, plain = ours(bench, "tests", "adaptive"), ours(bench, "tests", "argmax", weight=1.0, width=1)
    return Measurement(mine.rate, "argmax path", plain.rate, mine.n)


@claim(
    "diffuspec",
    claim="On held-out code an n-gram model fitted on the training files under the row's own text accepts more",
    metric=METRIC,
    expected="> 1",
)
def fitted_counts_help(bench: Bench) -> Measurement:
    from pertoken.zoo import corpus

    tokenizer = suite.pair(bench).tokenizer
    texts = list(corpus.split_texts("train").values())[: 40 if bench.quick else 400]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    mine = ours(bench, "code", "fitted", ngrams=NGramCounts.fitted(ids, suite.pair(bench).target.config.vocab_size))
    plain = ours(bench, "code", "adaptive")
    return Measurement(mine.rate, "the row's own text", plain.rate, mine.n)


@claim(
    "diffuspec",
    claim="On held-out code it accepts more than a chain of five from the causal draft",
    metric=METRIC,
    expected="> 1",
)
def beats_chain(bench: Bench) -> Measurement:
    chain = counted(bench, "code", "chain", lambda target, draft: Chain(draft, size=5))
    mine = ours(bench, "code", "adaptive")
    return Measurement(mine.rate, "chain", chain.rate, mine.n)
