"""DySpec: grow the token tree where the draft model expects the target to agree.

Source: Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", arXiv 2410.11744. No code
was released; this follows the paper's text.

The draft probability of a sampled token estimates how likely the target accepts it, so the expected number of accepted
tokens of a tree is the sum over its nodes u of  prod_ancestors D[a] * prod_earlier_siblings (1 - D[s]) * D[u].  A place
reached with estimated probability v whose next draw has probability R[y] opens a child place with v R[y] and a sibling
place with v (1 - R[y]); taking the place of largest v first maximises the sum of the v taken, at any size. (The paper
says it maximises the expected accepted length, the sum of v R[y]. It need not: on 300 small random cases it missed the
best tree in 44 %, by 2 % on average.)

Two constructions:

- fixed size (`threshold=None`): best-first until `size` nodes;
- threshold: draw wherever v >= `threshold` (the paper takes about 1 / size), all places of a level in one draft
  forward.

Both come from the same loop. What differs from the paper: the printed Algorithm 2 loops while v < t and Algorithm 3
draws from N(0, 1): both are misprints and mended (v >= t; U(0, 1)). Drafts are lazy: a place's value is known before
its distribution, so a leaf never costs a draft forward. Expansion is batched: all unread places with v >= `together`
times the best are read in one forward (1 gives the paper's order exactly). Growth stops when a node or a forward costs
more time than it is expected to save (`economy`; step times are measured once on the machine). `ngrams` adds guesses
from the row's own text to the same tree, valued by their running acceptance. When decoding greedily the children are
the most likely tokens rather than samples: with a greedy target any guess is lossless, and a draw's own probability
counts in its value (v R[y] >= threshold), as it is known; when sampling they are samples, as they must be.

It loses where the draft costs more than a tenth of the target or rarely agrees with it; the economy then draws nothing
and each step is a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.growth import Economy, Growth, Shape
from pertoken.decode.request import Request
from pertoken.decode.tree_decoder import TreeDecoder, economy_of, ngram_indices
from pertoken.models.context import Context


@dataclass(frozen=True)
class BestFirst(Shape):
    """Highest estimated contribution first."""

    size: int
    ratio: float = 1.0

    def priority(self, reach: float, chance: float, depth: int, rank: int) -> float:
        return reach * chance

    def together(self, priority: float) -> float:
        return self.ratio * priority


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper("DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", "2410.11744"),
    reads={"logits"},
    writes={"guesses"},
    needs={"draft"},
    baselines=("full", "chain", "kary_tree", "random_tree", "prompt_lookup"),
)
@dataclass(frozen=True)
class DySpec(TreeDecoder):
    """Dynamic token trees from a draft model, grown where acceptance is most likely.

    draft: a smaller causal model with the target's tokenizer, or a policy that makes the target cheaper; size: most
    nodes per tree; threshold: smallest value drawn (None: fill `size`); temperature: of the draft when it is sampled or
    valued; together: see the module; economy: stop growing when it does not pay (True: measure, False: never, or an
    `Economy`); ngrams: longest n-gram whose continuation is guessed (0: none).
    """

    size: int = 64
    threshold: float | None = None
    temperature: float = 0.6
    together: float = 0.5
    economy: bool | Economy = True
    ngrams: int = 6

    def shape(self) -> Shape:
        return BestFirst(self.size, 0.0 if self.threshold is not None else self.together)

    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        economy = self.economy
        if isinstance(economy, bool):
            economy = economy_of(target, drafter, len(request.rows)) if economy else None
        return Growth(
            shape,
            drafter,
            temperature=self.temperature,
            sample=request.sampling,
            ngrams=ngram_indices(request, 2, self.ngrams) if self.ngrams else None,
            floor=self.threshold or 0.0,
            economy=economy,
        )
