"""Star graphs: a planning task, and small models of three kinds trained on it.

`degree` arms, each a directed path of `arms[0]`..`arms[1]` nodes, share one node, the centre. In the asymmetric task an
arm passes through the centre at a random index below its length - 2, so that the start is not the centre and the fork
lies ahead; in the symmetric one all arms start at it and are of the greater length. The answer is arm 0 from its start
to its goal (ILM's `star_small` and `vstar` sets, arXiv 2505.05755). Node names are random, of `names`.

A row is `[CLS, u v of every edge in random order, start, goal, gap marker, answer]`. The answer is the path's nodes
in order; with `pairs`, as in the paper, u v of its edges. There every inner node occurs twice, so an insertion
model, whose target counts what is missing, values a node that is one of two as highly as the goal, which is certain.
The paper trains for 50,000 steps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pertoken.zoo import WEIGHTS
from pertoken.zoo.insertion import insertion_losses, shortened, spread_levels
from pertoken.zoo.masked import EPS, Bidirectional

END, MASK, MARKER, FIRST = 0, 1, 2, 3  # CLS, stop and padding; mask; gap marker; the token of the first name
KINDS = ("insertion", "masked", "autoregressive")


@dataclass(frozen=True)
class Graphs:
    """Rows of graphs: ids, valid, answer `[row, token]`, padded on the right by at least one end of text; answer marks
    what is to be found."""

    ids: Tensor
    valid: Tensor
    answer: Tensor

    @property
    def prompts(self) -> dict[str, Tensor]:
        """Left-padded input ids and attention mask, up to and with the gap marker."""
        given = self.valid & ~self.answer
        width = int(given.sum(-1).max())
        order = given.byte().argsort(dim=-1, stable=True)[:, -width:]
        mask = given.gather(1, order)
        return {"input_ids": self.ids.gather(1, order).masked_fill(~mask, END), "attention_mask": mask.long()}

    @property
    def answers(self) -> list[list[int]]:
        return [ids[answer].tolist() for ids, answer in zip(self.ids, self.answer, strict=True)]


@dataclass(frozen=True)
class StarGraphs:
    """The task. arms: least and greatest number of nodes of an arm, the centre among them; pairs: answers are edges."""

    degree: int = 3
    arms: tuple[int, int] = (3, 5)
    names: int = 20
    symmetric: bool = False
    pairs: bool = False

    def __post_init__(self) -> None:
        low, high = self.arms
        if not (3 <= low <= high and self.degree >= 1 and self.degree * (high - 1) + 1 <= self.names):
            raise ValueError(
                f"degree {self.degree} with arms of {low} to {high} nodes needs arms of at least 3 nodes and "
                f"{self.degree * (high - 1) + 1} names; there are {self.names}"
            )

    @property
    def vocabulary(self) -> int:
        return FIRST + self.names

    @property
    def longest_answer(self) -> int:
        return 2 * (self.arms[1] - 1) if self.pairs else self.arms[1]

    @property
    def width(self) -> int:
        return 1 + 2 * self.degree * (self.arms[1] - 1) + 3 + self.longest_answer + 1

    def sample(self, count: int, generator: torch.Generator) -> Graphs:
        low, high = self.arms
        rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
        length = low + (rand(count, self.degree) * (high - low + 1)).long()
        centre = (rand(count, self.degree) * (length - 2)).long()
        if self.symmetric:
            length, centre = torch.full_like(length, high), torch.zeros_like(centre)
        name = FIRST + rand(count, self.names).argsort(-1)
        place, arm = torch.arange(high), torch.arange(self.degree)[:, None]
        at = centre[..., None]
        own = 1 + arm * (high - 1) + place - (place > at).long()
        node = name.gather(1, own.masked_fill(place == at, 0).flatten(1)).view(count, self.degree, high)
        edges = torch.stack([node[..., :-1], node[..., 1:]], -1)  # [row, arm, edge, 2]
        real = place[:-1] < length[..., None] - 1
        order = rand(count, self.degree * (high - 1)).argsort(-1)
        shuffled = edges.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)
        goal = node[:, 0].gather(1, length[:, :1] - 1)
        column = lambda token: torch.full((count, 1), token)  # noqa: E731
        path, on_path = node[:, 0], place < length[:, :1]
        if self.pairs:
            path, on_path = edges[:, 0].flatten(1), real[:, 0].repeat_interleave(2, 1)
        parts = [column(END), shuffled, node[:, 0, :1], goal, column(MARKER), path, column(END)]
        yes = torch.ones(count, 1, dtype=torch.bool)
        real_edges = real.flatten(1).gather(1, order).repeat_interleave(2, 1)
        valid = torch.cat([yes, real_edges, yes, yes, yes, on_path, ~yes], 1)
        ids = torch.cat(parts, 1)
        answer = torch.zeros_like(valid)
        answer[:, -self.longest_answer - 1 :] = valid[:, -self.longest_answer - 1 :]
        front = (~valid).byte().argsort(dim=-1, stable=True)
        ids, valid, answer = (x.gather(1, front) for x in (ids, valid, answer))
        return Graphs(ids.masked_fill(~valid, END), valid, answer)

    def edges_right(self, graphs: Graphs, found: list[list[int]]) -> Tensor:
        """`[row]` share of the answer's edges that stand in `found` in their place."""
        share, stride = [], 2 if self.pairs else 1
        for wanted, got in zip(graphs.answers, found, strict=True):
            pairs = [wanted[i : i + 2] == got[i : i + 2] for i in range(0, len(wanted) - 1, stride)]
            share.append(sum(pairs) / len(pairs))
        return torch.tensor(share)


@dataclass(frozen=True)
class StarRecipe:
    """How one model is trained: `kind` is one of `KINDS`; lr of matrices (Muon) and of the rest (AdamW)."""

    kind: str
    task: StarGraphs = StarGraphs()
    width: int = 128
    layers: int = 4
    heads: int = 4
    steps: int = 3000
    batch: int = 64
    lr: float = 4e-3
    embedding_lr: float = 2e-3
    warmup: int = 100
    seed: int = 0

    def config(self) -> LlamaConfig:
        config = LlamaConfig(
            vocab_size=self.task.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.width * 8 // 3 // 8 * 8,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.task.width + 16,
            tie_word_embeddings=True,
            bos_token_id=END,
            eos_token_id=END,
            pad_token_id=END,
        )
        if self.kind == "masked":
            config.is_causal, config.mask_token_id, config.prediction_shift = False, MASK, 1
        if self.kind == "insertion":
            config.is_causal, config.mask_token_id, config.stop_token_id = False, MARKER, END
        return config


def insertion(model: Any, forward: Any, graphs: Graphs, generator: torch.Generator) -> Tensor:
    open_ = graphs.answer | (graphs.valid & (graphs.ids == MARKER))
    levels = spread_levels(len(open_), generator)
    short = shortened(graphs.ids, graphs.valid, open_, MARKER, levels, generator)
    losses, stops, _ = insertion_losses(forward(short.ids, short.bias), model.lm_head, short, END)
    return losses.mean() + stops.mean()


def masked(model: Any, forward: Any, graphs: Graphs, generator: torch.Generator) -> Tensor:
    """LLaDA's loss; the canvas is as long as the longest answer, and the end of text that fills it up is learnt."""
    ids, longest = graphs.ids, int(graphs.answer.sum(-1).max())
    given = (graphs.valid & ~graphs.answer).sum(-1, keepdim=True)
    place = torch.arange(ids.shape[1])
    open_, read = (place >= given) & (place < given + longest), place < given + longest
    p = ((1 - EPS) * spread_levels(len(ids), generator) + EPS)[:, None]
    hidden = open_ & (torch.rand(ids.shape, generator=generator) < p)
    bias = torch.zeros(read.shape).masked_fill_(~read, torch.finfo(torch.float32).min)[:, None, None]
    states = forward(ids.masked_fill(hidden, MASK), bias)
    logits = model.lm_head(states[:, :-1][hidden[:, 1:]]).float()
    losses = F.cross_entropy(logits, ids[hidden], reduction="none")
    return (losses * (1 / (p * longest)).expand_as(ids)[hidden]).sum() / len(ids)


def autoregressive(model: Any, forward: Any, graphs: Graphs, generator: torch.Generator) -> Tensor:
    """Next-token loss of the answer and the end of text behind it."""
    learnt = graphs.answer | F.pad(graphs.answer, (1, -1))
    states = forward(input_ids=graphs.ids, use_cache=False).last_hidden_state
    logits = model.lm_head(states[:, :-1][learnt[:, 1:]]).float()
    return F.cross_entropy(logits, graphs.ids[:, 1:][learnt[:, 1:]])


LOSSES = {"insertion": insertion, "masked": masked, "autoregressive": autoregressive}


def train(recipe: StarRecipe, progress: Callable[[int, float], None] | None = None) -> Any:
    """A model trained by the recipe, in evaluation mode. progress: told the step and the mean loss at times."""
    torch.manual_seed(recipe.seed)
    model: Any = LlamaForCausalLM(recipe.config())
    forward: Any = model.model if recipe.kind == "autoregressive" else Bidirectional(model)
    generator = torch.Generator().manual_seed(recipe.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers = (
        torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    )
    mean = 0.0
    with torch.enable_grad():
        for step in range(recipe.steps):
            rate = min((step + 1) / recipe.warmup, max((recipe.steps - step) / (0.4 * recipe.steps), 0.02), 1.0)
            for optimizer, peak in zip(optimizers, (recipe.lr, recipe.embedding_lr), strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate
            loss = LOSSES[recipe.kind](model, forward, recipe.task.sample(recipe.batch, generator), generator)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            mean = float(loss.detach()) if step == 0 else 0.98 * mean + 0.02 * float(loss.detach())
            if progress is not None and (step == 0 or (step + 1) % 100 == 0):
                progress(step + 1, mean)
    return model.eval()


def cache_directory() -> Path:
    """Where models made on demand are kept: `$XDG_CACHE_HOME/pertoken`, or `~/.cache/pertoken`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pertoken"


def trained(
    recipe: StarRecipe, directory: Path | None = None, progress: Callable[[int, float], None] | None = None
) -> Any:
    """The model of a recipe: the packaged one, or that in `directory` (default: the user's cache), trained and put
    there if it is not."""
    about = json.dumps(asdict(recipe), sort_keys=True)
    name = f"star-{recipe.kind}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    path = WEIGHTS / "star" / name
    if not (path / "recipe.json").exists():
        path = (directory or cache_directory()) / name
    if not (path / "recipe.json").exists():
        train(recipe, progress).save_pretrained(path)
        (path / "recipe.json").write_text(about)
    model: Any = LlamaForCausalLM.from_pretrained(path, local_files_only=True)
    return model.eval()
