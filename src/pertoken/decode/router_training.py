"""Lessons for R2R's router, and its training.

Path following: the large model answers; the small one reads along, and where its token differs from the answer's, that
token is put in its place and the large model goes on to the end of the sentence. A judge compares the sentence with the
answer's own: the token is divergent if they do not mean the same. Tokens that agree are not. (arXiv 2505.21600.)

A sentence ends with a token that holds a newline, or one of . ! ? for prose. The judge here is a function of two texts:
`other_structure` for code; for tasks with an answer, whether the answers differ; a large model's verdict, as in the
paper.
"""

from __future__ import annotations

import io
import keyword
import re
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.errors import BadRequest
from pertoken.decode.router import TOP, Router, Seen, threshold_for
from pertoken.models.adapter import adapter_for

Judge = Callable[[str, str], bool]
NAMES = re.compile(r"[A-Za-z_]\w*|\d+|\S")


@dataclass(frozen=True)
class Lessons:
    """One entry per token of the answers: what the small model saw, whether its token is the answer's, and whether it
    is divergent."""

    seen: Seen
    mismatch: Tensor
    divergent: Tensor

    def part(self, index: Tensor) -> Lessons:
        seen = Seen(self.seen.state[index], self.seen.logits[index], self.seen.tokens[index])
        return Lessons(seen, self.mismatch[index], self.divergent[index])


def structure(line: str) -> list[str]:
    """A line of Python with every name, number and string replaced by one of its kind; keywords and operators stay."""
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
            if token.type == tokenize.NAME:
                found.append(token.string if keyword.iskeyword(token.string) else "name")
            elif token.type == tokenize.NUMBER:
                found.append("0")
            elif token.type == tokenize.STRING:
                found.append("''")
            elif token.type in (tokenize.OP, tokenize.ERRORTOKEN):
                found.append(token.string)
    except (tokenize.TokenError, IndentationError, SyntaxError):  # a part of a line: bracket left open
        pieces = NAMES.findall(line)
        found = [p if keyword.iskeyword(p) or not p[0].isalnum() else "0" if p[0].isdigit() else "name" for p in pieces]
    return found


def other_structure(one: str, other: str) -> bool:
    """Whether two lines of Python differ in more than names and constants."""
    return structure(one) != structure(other)


def ends_of_sentences(tokenizer: Any, marks: str = "\n") -> Tensor:
    """`[vocabulary]` bool: tokens that hold one of these marks."""
    return torch.tensor([any(mark in tokenizer.decode([i]) for mark in marks) for i in range(len(tokenizer))])


@torch.no_grad()
def lessons(
    large: Any,
    small: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    judge: Judge = other_structure,
    *,
    new: int = 48,
    follow: int = 24,
    marks: str = "\n",
    batch: int = 32,
    status: Callable[[str], None] = lambda text: None,
) -> Lessons:
    """Lessons from the large model's answers to these prompts, `new` tokens each; follow: most tokens of a sentence
    that it goes on with. Raises `BadRequest` where the answers hold nothing to learn from."""
    ends = ends_of_sentences(tokenizer, marks)
    parts, todo = [], []
    for at in range(0, len(prompts), batch):
        texts = list(prompts[at : at + batch])
        inputs = dict(tokenizer(texts, return_tensors="pt", padding=True))
        width = inputs["input_ids"].shape[1]
        whole = large.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(texts), new)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        adapter = adapter_for(small)
        out = small(whole, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False)
        logits, states = out.logits[:, width - 1 : -1], out.hidden_states[-1][:, width - 1 : -1]
        tokens = logits.argmax(-1)
        mismatch = tokens != whole[:, width:]
        best = logits.topk(min(TOP, adapter.vocabulary), -1).values
        parts.append((states.flatten(0, 1), best.flatten(0, 1), tokens.flatten(), mismatch.flatten()))
        for row, place in mismatch.nonzero().tolist():
            given = whole[row, mask[row].bool()].tolist()
            start = len(given) - new
            todo.append((given, start, start + place, int(tokens[row, place])))
        status(f"answers {min(at + batch, len(prompts))}/{len(prompts)}")
    if not parts or not todo:
        raise BadRequest("the small model writes what the large one does on these prompts; there is nothing to route")
    verdicts = []
    todo_order = sorted(range(len(todo)), key=lambda i: todo[i][2])  # batches of like lengths
    found: dict[int, bool] = {}
    for at in range(0, len(todo), batch):
        chosen = todo_order[at : at + batch]
        branches = _followed(large, [todo[i] for i in chosen], ends, follow)
        for i, branch in zip(chosen, branches, strict=True):
            found[i] = judge(*_sentences(tokenizer, todo[i], branch, ends, follow))
        status(f"sentences {min(at + batch, len(todo))}/{len(todo)}")
    verdicts = [found[i] for i in range(len(todo))]
    state, best, tokens, mismatch = (torch.cat(column) for column in zip(*parts, strict=True))
    divergent = torch.zeros_like(mismatch)
    divergent[mismatch] = torch.tensor(verdicts)
    return Lessons(Seen(state, best, tokens), mismatch, divergent)


Place = tuple[list[int], int, int, int]  # text, where its answer begins, the place, the small model's token there


def _followed(large: Any, places: list[Place], ends: Tensor, follow: int) -> list[list[int]]:
    """How the large model goes on behind the small one's tokens, to the end of the sentence."""
    rows = [[*text[:place], token] for text, _, place, token in places]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = large.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=follow,
        do_sample=False,
        eos_token_id=ends.nonzero().flatten().tolist(),
        pad_token_id=0,
    )
    return out[:, width:].tolist()


def _sentences(tokenizer: Any, place: Place, branch: list[int], ends: Tensor, follow: int) -> tuple[str, str]:
    """The sentence around a place as the answer has it, and with the small model's token."""
    text, start, at, token = place
    first = at
    while first > start and not ends[text[first - 1]]:
        first -= 1

    def upto(tokens: list[int]) -> list[int]:
        stop = next((i for i, one in enumerate(tokens) if ends[one]), len(tokens))
        return tokens[: min(stop + 1, follow + 1)]

    head = text[first:at]
    theirs = head + upto(text[at:])
    ours = head + (upto([token, *branch]))
    shorter = at + len(upto(text[at:])) == len(text) and not ends[text[-1]]  # the answer was cut within the sentence
    if shorter:
        ours = ours[: len(theirs)]
    return tokenizer.decode(theirs), tokenizer.decode(ours)


def train_router(
    small: Any,
    found: Lessons,
    *,
    hidden: int = 1024,
    blocks: int = 6,
    lr: float = 5e-5,
    weight_decay: float = 5e-4,
    batch: int = 1024,
    epochs: int = 50,
    patience: int = 10,
    recall: float = 0.95,
    held: float = 0.2,
    most_weight: float = 50.0,
    seed: int = 0,
    status: Callable[[str], None] = lambda text: None,
) -> Router:
    """A router for this small model. The last `held` of the lessons choose when to stop and the threshold, which finds
    at least `recall` of the divergent tokens. Divergent tokens weigh as much as all others together, at most
    `most_weight` times one of them."""
    count = len(found.divergent)
    cut = count - int(held * count)
    seen, kept = found.part(torch.arange(cut)), found.part(torch.arange(cut, count))
    if not bool(seen.divergent.any()) or not bool(kept.divergent.any()):
        raise BadRequest(f"of {count} tokens too few are divergent to learn from and to judge by; give more prompts")
    torch.manual_seed(seed)
    router = Router(small, hidden, blocks)
    positive = seen.divergent.float().mean()
    weight = ((1 - positive) / positive).clamp(max=most_weight)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=weight_decay)
    best, waited = (float("inf"), router.state_dict()), 0
    for epoch in range(epochs):
        router.train()
        for index in torch.randperm(cut).split(batch):
            part = seen.part(index)
            loss = F.binary_cross_entropy_with_logits(router(part.seen), part.divergent.float(), pos_weight=weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        router.eval()
        with torch.no_grad():
            judged = float(
                F.binary_cross_entropy_with_logits(router(kept.seen), kept.divergent.float(), pos_weight=weight)
            )
        if judged < best[0]:
            best, waited = (judged, {name: value.clone() for name, value in router.state_dict().items()}), 0
        else:
            waited += 1
        if waited >= patience:
            break
        status(f"router: epoch {epoch + 1}, held-out loss {judged:.4f}")
    router.load_state_dict(best[1])
    with torch.no_grad():
        chances = router.eval()(kept.seen).sigmoid()
    router.about["threshold"] = threshold_for(chances, kept.divergent, recall)
    router.about |= {"lessons": count, "divergent": float(found.divergent.float().mean()), "loss": best[0]}
    return router
