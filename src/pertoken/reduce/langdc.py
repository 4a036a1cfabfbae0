"""LangDC: a small language expert describes a clip, and the states of its description are the clip's tokens.

Source: "Seeing More, Saying More: Lightweight Language Experts are Dynamic Video Token Compressors" (arXiv 2509.00969).
A clip of T frames is cut into S segments. With the host's encoder's states F in R^{T x patch x c}:
- base stream: E = projected(pool_{b x b}(F)) in R^{T b b x d}, by the host's own projector, of all frames;
- soft tokens: the expert (`expert`) writes a description y_1 .. y_n of each segment, n at most `limit`, and the states
  h_j of its layer l that carry them become z_j = post(norm(h_j)) in R^d;
- the host reads [E; z of segment 1; ...; z of segment S] in the places of the clip.
How many tokens a clip gets is how long its descriptions are. The expert is trained on condensed descriptions, whose
length is how much there is to tell, so that the end token is the decision. Training (`zoo.watching`): the expert on
descriptions; then post, and the host, on answers, with given descriptions read in one forward.

limit: the paper's 128 soft tokens a segment; a budget makes it less where base stream and descriptions would be more;
end_bias: added to the end token's logit, a dial of quality against cost that the paper lacks. A description without a
token keeps the state of its end, so that a segment is never silent.

Differs from the paper: its code gives the host embeddings of the caption's tokens, this the states of layer l, as the
text says, at the positions that carry a token both in decoding and in training (in its code's decoding at those that
predict it, one earlier); there is a layer norm before post; the base stream is pooled before the host's projector, as
the host itself does; one image encoder and no video encoder; batches of clips, any number of segments.

It loses where the expert's sequential decoding costs more than the shorter prompt saves, which is so for small hosts,
and on questions about what the description leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.core.decision import Keep
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.models.llava import Llava
from pertoken.reduce.clips import Clips, Offer, pooled_to
from pertoken.reduce.expert import Expert

WRITTEN, FIRST = "written", "first"  # of candidates: a description's own; those that always stay
SAID = "descriptions"  # in the attachment's state: of each clip of the last forward, ids of each segment's description


@method(
    question="reduce",
    shape="policy",
    exactness="approximate",
    paper=Paper(
        "Seeing More, Saying More: Lightweight Language Experts are Dynamic Video Token Compressors", "2509.00969"
    ),
    writes={"video tokens"},
    needs={"video", "expert"},
    baselines=("fixed_pooling", "random_places"),
)
@dataclass(frozen=True)
class LangDC(Clips):
    """Show the host a coarse clip and what a small language model says of it, as states; rich clips get more tokens."""

    budget: Budget = Budget(fraction=0.5)
    expert: Expert | str | Path | None = field(default=None, repr=False)
    limit: int = 128
    end_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit < 1:
            raise BadRequest(f"limit={self.limit} leaves no soft token; give 1 or more for each segment")

    def fitted(self, model: object) -> LangDC:
        if self.expert is None:
            raise BadRequest(
                "LangDC needs an expert for this model; give expert=Expert.load(directory) from "
                "pertoken.reduce.expert, or the directory, or zoo:clips-langdc/langdc"
            )
        expert = self.expert if isinstance(self.expert, Expert) else Expert.load(self.expert)
        expert.check(model)
        return replace(self, expert=expert)

    def offer(self, llava: Llava, states: Tensor, most: int, whole: bool) -> Offer:
        expert = self.expert
        assert isinstance(expert, Expert)
        segments = expert.segments(states)
        each = len(segments) // len(states)
        parts, base = [], expert.setting.base
        if base:
            parts.append(llava.projected(pooled_to(states, base, base)))
        count = parts[0].shape[1] if base else 0
        steps = min(self.limit, (most - count) // each)
        if steps < 1:
            raise BadRequest(
                f"a budget of {most} tokens for a clip is less than its {count} coarse tokens and one for each of its "
                f"{each} segments; give Budget(tokens={count + each}) or more"
            )
        said = expert.describe(segments, steps, whole, self.end_bias)
        soft = expert.soft(said.hidden).to(states.dtype)
        ran = torch.arange(steps, device=soft.device).expand(len(soft), -1) < said.ids.shape[1]

        def of_clips(values: Tensor) -> Tensor:
            """`[clip, segment * step, ...]`, filled up to all the steps that there could have been."""
            filled = values.new_zeros(len(values), steps, *values.shape[2:])
            filled[:, : values.shape[1]] = values
            return filled.unflatten(0, (-1, each)).flatten(1, 2)

        coarse = ran.new_ones(len(states), count)
        written, valid = (torch.cat([coarse, of_clips(values)], 1) for values in (said.written, ran))
        first = torch.zeros_like(ran)
        first[:, 0] = True
        signals = {WRITTEN: written, FIRST: torch.cat([coarse, of_clips(first)], 1)}
        texts = [ids[there].tolist() for ids, there in zip(said.ids, said.written, strict=True)]
        notes = {SAID: [texts[i : i + each] for i in range(0, len(texts), each)]}
        return Offer(torch.cat([*parts, of_clips(soft)], 1), valid, signals, notes)

    def decide(self, view: View) -> Keep:
        if WRITTEN not in view.signals:
            return Keep(view.valid, view.valid.clone())
        return Keep(view.valid, view.valid & (view.signals[WRITTEN] | view.signals[FIRST]))
