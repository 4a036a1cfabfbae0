"""dLLM code study: a diffusion model and its autoregressive twin write the same code, one knob at a time.

Source: "Beyond Autoregression: An Empirical Study of Diffusion Large Language Models for Code Generation", arXiv
2509.11252. Its questions: (1) how good are diffusion models beside autoregressive ones of their size; (2) what do block
length, canvas length, steps, remasking and temperature do to quality; (3) what do canvas and steps do to cost.

`sweeps` has the grid as data: from a base setting, block {8, 16, ..., canvas}, canvas {64, 128, 256, all the room there
is} at a constant number of positions per step, steps {1/16, ..., 1} of the canvas, temperature {0, 0.2, ..., 1}, and
every remasking rule at several numbers of steps; each with the twin's setting beside it. `study` runs a grid, on any
pair of transformers' models with one tokenizer, and counts for every setting: forwards (NFE), tokens before the end of
text per forward, token-forwards, operations, seconds, pass@1 and pass@k, any other measure of the judge, output length,
and the share of the canvas that is end of text.

    operations = 2 W T + 4 H A + 2 D V R                                                       (multiply-adds count 2)

W: weights of the layers' linear maps; T: token-forwards; H: heads times head width times layers; A: pairs of a position
computed and a position it reads; D, V: width and vocabulary; R: positions at which logits were computed (the block, at
every step). The twin is charged with a cache: its prompt once, then one position per token.

What differs from the paper: every model gets the same grid (the paper tuned each pair, so that its first table mixes
models and decoders); prompts are repeated over seeds where anything is random, and everything has a bootstrap interval
over prompts; cost is counted and not only timed. The grid itself is a reconstruction: the paper's is not in its
repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pertoken.core.card import Paper, method
from pertoken.core.cost import timed
from pertoken.core.errors import BadRequest
from pertoken.denoise.dual_cache import DualCache
from pertoken.denoise.entropy import Entropy
from pertoken.denoise.loop import Denoise
from pertoken.denoise.margin import Margin
from pertoken.denoise.origin import Origin
from pertoken.denoise.prefix_cache import PrefixCache
from pertoken.denoise.random_commit import RandomCommit
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.rules import CommitRule, RefreshRule
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.study import PASSED, Outcome, Setting, Study
from pertoken.denoise.threshold import Threshold
from pertoken.models.adapter import adapter_for

RULES: dict[str, Callable[[Setting, int], CommitRule]] = {
    "low_confidence": lambda setting, seed: Schedule(setting.alg_temp),
    "maskgit_plus": lambda setting, seed: Schedule(setting.alg_temp, sharpened=True),
    "margin": lambda setting, seed: Margin(setting.alg_temp),
    "entropy": lambda setting, seed: Entropy(setting.alg_temp),
    "threshold": lambda setting, seed: Threshold(),
    "random": lambda setting, seed: RandomCommit(seed),
    "origin": lambda setting, seed: Origin(seed),
}
REFRESHES: dict[str, Callable[[], RefreshRule]] = {
    "recompute": Recompute,
    "prefix_cache": PrefixCache,
    "dual_cache": DualCache,
}
REMASKING = ("low_confidence", "margin", "entropy", "random", "origin")
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
CANVASES = (64, 128, 256)
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

Judge = Callable[[Sequence[int], Sequence[str]], Sequence[Mapping[str, float]]]


def sweeps(
    base: Setting,
    room: int,
    *,
    shares: Sequence[float] = SHARES,
    canvases: Sequence[int] = CANVASES,
    temperatures: Sequence[float] = TEMPERATURES,
    rules: Sequence[str] = REMASKING,
    rule_shares: Sequence[float] = (1 / 8, 1 / 4, 1 / 2),
) -> dict[str, list[Setting]]:
    """The grid around `base`; room: the longest canvas that the longest prompt leaves. Numbers of steps are rounded to
    what the blocks allow, and settings that come to be equal are named once."""
    block, per_step = base.block or base.canvas, base.canvas / (base.steps or base.canvas)
    lengths = sorted({length // block * block for length in (*canvases, room) if block <= length <= room})
    blocks = [b for b in (2**n for n in range(3, 16)) if b <= base.canvas and base.canvas % b == 0]
    steps = [replace(base, steps=_steps(base, share)) for share in shares]
    found = {
        "steps": steps,
        "block": [replace(base, block=b, steps=_steps(replace(base, block=b), base.share)) for b in blocks],
        "canvas": [_on(replace(base, canvas=length), per_step) for length in lengths],
        "temperature": [replace(base, temperature=t) for t in temperatures],
        "remasking": [replace(base, rule=r, steps=_steps(base, share)) for r in rules for share in rule_shares],
    }
    return {name: list(dict.fromkeys([*some, *[s.twin for s in some]])) for name, some in found.items()}


def _steps(setting: Setting, share: float) -> int:
    blocks = setting.canvas // (setting.block or setting.canvas)
    return max(round(setting.canvas * share / blocks), 1) * blocks


def _on(setting: Setting, per_step: float) -> Setting:
    return replace(setting, steps=_steps(setting, 1 / per_step))


@method(
    question="denoise",
    shape="tool",
    exactness="approximate",
    paper=Paper(
        "Beyond Autoregression: An Empirical Study of Diffusion Large Language Models for Code Generation", "2509.11252"
    ),
    reads={"logits"},
    needs={"diffusion", "twin"},
    baselines=("full", "random_commit"),
)
def study(
    model: Any,
    twin: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    judge: Judge,
    *,
    grid: Mapping[str, Sequence[Setting]] | None = None,
    base: Setting | None = None,
    samples: int = 5,
    batch: int = 16,
    seed: int = 0,
    twin_decoder: Any = None,
    about: str = "prompts",
    known: Study | None = None,
    status: Callable[[str], None] = lambda text: None,
) -> Study:
    """Run a grid of settings on a diffusion model and an autoregressive twin.

    judge: (indices of prompts, answers) -> for each a mapping with "passed" (0 or 1) and any other measures; grid:
    settings by sweep (default: `sweeps` around `base`); samples: answers per prompt where anything is random, each with
    a seed of its own from `seed` on; twin_decoder: a `custom_generate` for the twin (default: transformers' own loop);
    known: an earlier study of the same prompts, whose settings are not run again.
    """
    if not prompts:
        raise BadRequest("no prompts were given; a study needs at least one")
    if samples < 1 or batch < 1:
        raise BadRequest(f"samples={samples} and batch={batch} must be at least 1")
    if grid is None:
        longest = max(len(tokenizer(text)["input_ids"]) for text in prompts)
        grid = sweeps(base or Setting(), adapter_for(model).positions - longest)
    order = list(dict.fromkeys(setting for some in grid.values() for setting in some))
    for knob, known_names in (("rule", RULES), ("refresh", REFRESHES)):
        if strange := {getattr(s, knob) for s in order if not s.autoregressive} - known_names.keys():
            raise BadRequest(f"{knob} {min(strange)!r} is unknown; choose one of {', '.join(known_names)}")
    outcomes = dict(known.outcomes) if known is not None else {}
    for setting in order:
        if setting not in outcomes:
            status(f"{'twin' if setting.autoregressive else setting.rule}: {setting}")
            maker = _Answers(twin if setting.autoregressive else model, tokenizer, batch, twin_decoder)
            outcomes[setting] = maker.outcome(setting, prompts, judge, range(seed, seed + samples))
    return Study({name: list(some) for name, some in grid.items()}, outcomes, {"tasks": about, "seed": seed})


@dataclass
class _Answers:
    """Answers of one model, and what they cost."""

    model: Any
    tokenizer: Any
    batch: int
    twin_decoder: Any

    def outcome(self, setting: Setting, prompts: Sequence[str], judge: Judge, seeds: range) -> Outcome:
        seeds = seeds if setting.random else seeds[:1]
        lengths: list[list[int]] = [[] for _ in prompts]
        texts: list[list[str]] = [[] for _ in prompts]
        costs = [0, 0, 0.0, 0.0]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for seed in seeds:
            torch.manual_seed(seed)
            for start in range(0, len(prompts), self.batch):
                part = by_length[start : start + self.batch]
                ids, cost = self._generate(setting, [prompts[i] for i in part], seed)
                costs = [a + b for a, b in zip(costs, cost, strict=True)]
                before = self._before_end(ids)
                found = self.tokenizer.batch_decode(
                    [row[:count] for row, count in zip(ids.tolist(), before, strict=True)], skip_special_tokens=True
                )
                for i, count, text in zip(part, before, found, strict=True):
                    lengths[i].append(count)
                    texts[i].append(text)
        where = [(i, text) for i, row in enumerate(texts) for text in row]
        said = list(judge([i for i, _ in where], [text for _, text in where]))
        if len(said) != len(where) or any(PASSED not in one for one in said):
            raise BadRequest(f'the judge must give {len(where)} mappings with "{PASSED}", one per answer')
        verdicts: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in said[0]}
        for (i, _), one in zip(where, said, strict=True):
            for name, rows in verdicts.items():
                rows[i].append(float(one[name]))
        return Outcome(setting, verdicts, lengths, texts, int(costs[0]), int(costs[1]), costs[2], costs[3])

    def _generate(self, setting: Setting, texts: list[str], seed: int) -> tuple[Tensor, tuple[float, ...]]:
        """New ids `[row, position]`; forwards, token-forwards, operations and seconds, summed over rows."""
        device = next(self.model.parameters()).device
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(device)
        inputs.pop("token_type_ids", None)
        loop = None if setting.autoregressive else self._loop(setting, seed)
        decoder = loop or self.twin_decoder
        options: dict[str, Any] = {"max_new_tokens": setting.canvas, "do_sample": setting.temperature > 0}
        if setting.temperature > 0:
            options |= {"temperature": setting.temperature, "top_p": setting.top_p, "top_k": setting.top_k}
        if decoder is not None:
            options["custom_generate"] = decoder
        with timed(device) as clock:
            ids = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        if loop is not None:
            stats, block = loop.stats, setting.block or setting.canvas
            work = stats.row_steps, stats.token_forwards, stats.attended, stats.row_steps * block
        else:
            given = inputs["attention_mask"].sum(-1).tolist()
            new = [min(count + 1, ids.shape[1]) for count in self._before_end(ids)]
            read = [(g + n - 1, (g + n - 1) * (g + n) // 2) for g, n in zip(given, new, strict=True)]
            work = sum(new), sum(t for t, _ in read), sum(pairs for _, pairs in read), sum(new)
        return ids, (work[0], work[1], operations(self.model, *work[1:]), clock.seconds)

    def _loop(self, setting: Setting, seed: int) -> Denoise:
        refresh = REFRESHES[setting.refresh]()
        pace: Any = setting.pace
        return Denoise(RULES[setting.rule](setting, seed), refresh, block=setting.block, steps=setting.steps, pace=pace)

    def _before_end(self, ids: Tensor) -> list[int]:
        """Tokens of each row before its first end of text."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, (list, tuple)) else [ends]
        ended = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
        return torch.where(ended.any(-1), ended.int().argmax(-1), ids.shape[1]).tolist()


def operations(model: Any, token_forwards: int, attended: int, logits: int) -> float:
    """Floating-point operations by the formula above, of a transformer without mixtures of experts."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    maps = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    weights = sum(m.weight.numel() for m in maps)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * heads * width * config.num_hidden_layers * attended
    return 2.0 * weights * token_forwards + attention + 2.0 * head.weight.numel() * logits
