"""XGrammar: decoding under a grammar, where what the grammar forces costs no model step.

A `GrammarProcessor` among the call's logits processors keeps the text in a grammar: at every step, tokens that no
sentence could go on with get the score minus infinity. With t(x) the set of tokens allowed behind text x,

    p'(y | x)  =  p(y | x) [y in t(x)]  /  sum over z in t(x) of p(z | x).

Where t(x) = {y}, p'(y | x) = 1 whatever the model says. This decoder guesses exactly those tokens, as one line of nodes
below the last committed token, up to the first place with a choice, and verifies them with the model's next forward:
k forced tokens take one step instead of k, and the output is the same. Every other decoder that grows a tree does the
same at each of its nodes, besides drawing its own guesses from the limited distribution.

Source: Dong et al., "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models", arXiv
2411.15100 (jump-forward decoding). What differs: the paper appends forced text and tokenises all of it again; here a
forced token is one that the constraint allows alone, so that nothing changes but the number of steps. With `canonical`
masks (see `GrammarProcessor`) nearly all forced text is forced token by token.

Without a grammar, or where a grammar leaves a choice everywhere, it is plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

from pertoken.core.card import Paper, method
from pertoken.decode.chain import Line
from pertoken.decode.drafter import ModelDrafter
from pertoken.decode.growth import Growth, Shape
from pertoken.decode.request import Request
from pertoken.decode.tree_decoder import TreeDecoder
from pertoken.models.context import Context


@method(
    question="decode",
    shape="decoder",
    exactness="lossless",
    paper=Paper(
        "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models", "2411.15100"
    ),
    reads={"tokens"},
    writes={"guesses"},
    baselines=("full",),
)
@dataclass(frozen=True)
class XGrammar(TreeDecoder):
    """Decoding under a grammar; tokens that it forces take no step of their own. size: most of them in one step."""

    size: int = 64

    def shape(self) -> Shape:
        return Line(self.size)

    def growth(self, shape: Shape, request: Request, target: Context, drafter: ModelDrafter | None) -> Growth:
        return Growth(shape, None, temperature=1.0, sample=request.sampling)
