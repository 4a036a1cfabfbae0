"""Methods side by side on the same prompts: output, speed, model steps, operations, memory, and whether outputs agree.

Every side generates the same batches. One warm-up pass, then `repeats` timed passes in turn (A B C A B C ...) whose
median counts; operations are counted and decisions recorded in a further pass that is not timed. `generate` is
transformers' own plain loop on the same model: the outputs of every side are compared with its.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken.core import cost
from pertoken.core.attach import attach
from pertoken.core.card import Card, card
from pertoken.core.decision import Commit
from pertoken.core.trace import Trace
from pertoken.methods import load_methods

PLAIN = "generate"


@dataclass(frozen=True)
class Options:
    """How to generate. temperature 0 is greedy; dtype and device as in `models.load`; batch: prompts generated
    together."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    baseline: str = "full"
    seed: int = 0
    batch: int = 8
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too few; give at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; give 0 for greedy or more to sample")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]; give a share of the probability such as 0.9")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; give 0 for no limit or a number of tokens")

    def arguments(self, pad: int | None) -> dict[str, Any]:
        """Keyword arguments of `generate`; what is not given is off, whatever the model's own defaults."""
        common = {"max_new_tokens": self.max_new_tokens, "pad_token_id": pad, "do_sample": self.temperature > 0}
        if not self.temperature:
            return common
        return common | {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p or 1.0}


@dataclass(frozen=True)
class Run:
    """One side's figures. seconds: median of a pass over all prompts; tokens: generated in it; steps: forwards of the
    model; flops: operations; peak_bytes: memory of the process (or of the GPU) at its highest during the side's passes;
    speedup: tokens per second relative to the baseline; identical: same ids as `generate`, None where sampled.
    """

    name: str
    label: str
    seconds: float
    tokens: int
    tokens_per_second: float
    steps: int
    flops: int
    peak_bytes: int
    speedup: float
    identical: bool | None


@dataclass
class Comparison:
    """The runs in order; one trace per method that records; the text each side made of each prompt, by name."""

    model: str
    draft: str | None
    prompts: list[str]
    options: Options
    runs: list[Run] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    outputs: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but the traces, in types that JSON has."""
        return {
            "model": self.model,
            "draft": self.draft,
            "baseline": self.options.baseline,
            "options": asdict(self.options),
            "prompts": self.prompts,
            "runs": [asdict(run) for run in self.runs],
            "outputs": self.outputs,
        }


@dataclass
class Side:
    """One contender while it runs: its decoder and attached policies (none of either for plain generation)."""

    name: str
    label: str
    decoder: Any = None
    policies: tuple[Any, ...] = ()
    rows: list[list[int]] = field(default_factory=list)
    steps: int = 0
    peak_bytes: int = 0


def load_model(name: str, options: Options) -> tuple[Any, Any]:
    from pertoken.models.load import load

    return load(name, options.dtype, options.device)


def make_decoder(name: str, model: Any, draft: Any) -> Any:
    from pertoken.decode import make

    return make(name, draft=draft)


def parts_of(name: str) -> list[Card]:
    """The cards of "NAME" or "NAME+NAME"; raises `ValueError` for unknown names and for pairs without a meaning."""
    found = [card(part) for part in name.split("+")]
    for one in found:
        if one.shape not in ("decoder", "policy"):
            raise ValueError(f"{one.name} is an {one.shape}; only decoders and policies generate text")
    decoders = [one.name for one in found if one.shape == "decoder"]
    if len(decoders) > 1:
        raise ValueError(
            f"{' and '.join(decoders)} both choose the next token and cannot be combined; "
            f"give them as separate names ({' '.join(decoders)}) to see them side by side"
        )
    return found


def default_draft(model_name: str, names: list[str]) -> str | None:
    """For a zoo model and methods that need a draft: the zoo model distilled from it."""
    target = model_name.removeprefix("zoo:")
    if target == model_name or not any("draft" in one.needs for name in names for one in parts_of(name)):
        return None
    from pertoken.zoo.recipe import RECIPES

    return next((f"zoo:{name}" for name, recipe in RECIPES.items() if recipe.teacher == target), None)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one per line, or for `*.jsonl` the "prompt" of each object. Empty lines are passed over."""
    import json

    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path} line {number} is not an object with a "prompt": {line[:60]!r}') from error
    if not prompts:
        raise ValueError(
            f"{path} holds no prompt; write one per line, or one JSON object with a prompt per line (.jsonl)"
        )
    return prompts


def compare(
    names: list[str],
    model_name: str,
    draft_name: str | None,
    prompts: list[str],
    options: Options,
    status: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Generate from `prompts` with plain `generate`, the baseline and every named method, and set the figures together.

    names: registered decoders or policies (a policy alone is made lossless, "A+B" attaches policies under a decoder).
    Raises `ValueError` for unknown names, empty prompts, models that do not fit together, or too long a context.
    """
    load_methods()
    wanted = list(dict.fromkeys([PLAIN, options.baseline, *names]))
    for name in wanted[1:]:
        parts_of(name)
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty; give each some text to go on from")
    draft_name = draft_name or default_draft(model_name, wanted[1:])
    status(f"loading {model_name}")
    model, tokenizer = load_model(model_name, options)
    draft = None
    if draft_name is not None:
        draft, draft_tokenizer = load_model(draft_name, options)
        _check_tokenizers(tokenizer, draft_tokenizer, model_name, draft_name)
    batches = [
        tokenizer(prompts[i : i + options.batch], return_tensors="pt", padding=True, padding_side="left")
        for i in range(0, len(prompts), options.batch)
    ]
    batches = [{k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")} for batch in batches]
    _check_room(model, batches, options)
    sides = [_side(name, model, draft) for name in wanted]
    comparison = Comparison(model_name, draft_name, prompts, options)
    seconds = _time(sides, model, tokenizer, batches, options, status)
    flops, traces = {}, {}
    for side in sides:
        status(f"counting operations: {side.name}")
        flops[side.name], traces[side.name] = _count(side, model, tokenizer, batches, options)
    comparison.runs = _figures(sides, seconds, flops, options)
    for side in sides:
        comparison.outputs[side.name] = tokenizer.batch_decode(side.rows, skip_special_tokens=True)
        trace = traces[side.name]
        if trace is not None and trace.steps:
            runs = [asdict(run) for run in comparison.runs]
            trace.about |= {"method": side.name, "model": model_name, "runs": runs}
            comparison.traces.append(trace)
    return comparison


def _check_tokenizers(tokenizer: Any, draft: Any, model_name: str, draft_name: str) -> None:
    one, other = tokenizer.get_vocab(), draft.get_vocab()
    if one != other:
        odd = next(iter(sorted(one.items() ^ other.items())))
        raise ValueError(
            f"{draft_name} ({len(other)} tokens) does not share the tokenizer of {model_name} ({len(one)} tokens; they "
            f"differ for example in {odd[0]!r}); give a draft model with the target's own tokenizer"
        )


def _check_room(model: Any, batches: list[dict[str, Tensor]], options: Options) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(int(batch["attention_mask"].sum(-1).max()) for batch in batches)
    if limit is not None and longest + options.max_new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {options.max_new_tokens} are to be generated; the model has "
            f"{limit} positions. Shorten the prompt or lower max_new_tokens to {max(limit - longest, 0)}"
        )


def _side(name: str, model: Any, draft: Any) -> Side:
    if name == PLAIN:
        return Side(name, "transformers generate")
    parts = parts_of(name)
    if len(parts) == 1:
        label = f"lossless {name}" if parts[0].shape == "policy" else name
        return Side(name, label, make_decoder(name, model, draft))
    decoder = next((make_decoder(part.name, model, draft) for part in parts if part.shape == "decoder"), None)
    return Side(name, name, decoder, tuple(part.build() for part in parts if part.shape == "policy"))


def _generate(side: Side, model: Any, tokenizer: Any, batch: dict[str, Tensor], options: Options) -> list[list[int]]:
    """New ids of each row, to the end of text inclusive; adds the side's steps."""
    torch.manual_seed(options.seed)
    extra = {} if side.decoder is None else {"custom_generate": side.decoder}
    forwards = [0]
    with ExitStack() as stack:
        for policy in side.policies:
            stack.enter_context(attach(model, policy))
        if side.decoder is None:
            counter = model.register_forward_pre_hook(lambda module, args: forwards.__setitem__(0, forwards[0] + 1))
            stack.callback(counter.remove)
        ids = model.generate(**batch, **extra, **options.arguments(tokenizer.pad_token_id))
    side.steps += forwards[0] if side.decoder is None else int(side.decoder.stats.steps)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
    return [_to_end(row, ends) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


def _to_end(row: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def _pass(side: Side, model: Any, tokenizer: Any, batches: list[dict[str, Tensor]], options: Options) -> None:
    side.steps = 0
    _reset_peak(model.device)
    rows = [_generate(side, model, tokenizer, batch, options) for batch in batches]
    side.rows = [row for batch in rows for row in batch]
    side.peak_bytes = max(side.peak_bytes, cost.peak_memory(model.device))


def _time(
    sides: list[Side], model: Any, tokenizer: Any, batches: list, options: Options, status: Callable[[str], None]
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(options.repeats + 1):
        for side in sides:
            status(f"{'warming up' if turn == 0 else f'pass {turn} of {options.repeats}'}: {side.name}")
            with cost.timed(model.device) as spent:
                _pass(side, model, tokenizer, batches, options)
            if turn:
                seconds[side.name].append(spent.seconds)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _count(side: Side, model: Any, tokenizer: Any, batches: list, options: Options) -> tuple[int, Trace | None]:
    """Operations of one pass, and the trace of its first batch with the texts of that very pass."""
    traces: list[Trace] = []
    rows: list[list[int]] = []
    kept = (side.steps, side.peak_bytes)

    def work() -> None:
        for number, batch in enumerate(batches):
            with ExitStack() as stack:
                if side.decoder is not None and number == 0:
                    traces.append(stack.enter_context(side.decoder.record()))
                made = _generate(side, model, tokenizer, batch, options)
            if number == 0:
                rows.extend(made)

    flops = cost.count_flops(work)
    side.steps, side.peak_bytes = kept
    if not traces:
        return flops, None
    traces[0].about |= texts(traces[0], tokenizer, batches[0], rows)
    return flops, traces[0]


def _figures(sides: list[Side], seconds: dict[str, float], flops: dict[str, int], options: Options) -> list[Run]:
    tokens = {side.name: sum(map(len, side.rows)) for side in sides}
    speed = {name: tokens[name] / max(seconds[name], 1e-9) for name in seconds}
    return [
        Run(
            name=side.name,
            label=side.label,
            seconds=seconds[side.name],
            tokens=tokens[side.name],
            tokens_per_second=speed[side.name],
            steps=side.steps,
            flops=flops[side.name],
            peak_bytes=side.peak_bytes,
            speedup=speed[side.name] / max(speed[options.baseline], 1e-9),
            identical=None if options.temperature else side.rows == sides[0].rows,
        )
        for side in sides
    ]


def texts(trace: Trace, tokenizer: Any, batch: dict[str, Tensor], outputs: list[list[int]]) -> dict[str, Any]:
    """What a reader needs to draw a trace: prompts and outputs in pieces, and the text of every token guessed."""
    masks, prompts = batch["attention_mask"].bool(), batch["input_ids"]
    rows = [
        {"prompt": pieces(tokenizer, ids[mask].tolist()), "output": pieces(tokenizer, output)}
        for ids, mask, output in zip(prompts, masks, outputs, strict=True)
    ]
    commits = [step.decision for step in trace.steps if isinstance(step.decision, Commit)]
    guessed = sorted({token for commit in commits for token in commit.tokens[commit.valid].tolist()})
    return {"rows": rows, "vocabulary": {str(token): tokenizer.decode([token]) for token in guessed}}


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds. A character spread over several tokens is given to the last of them."""
    found, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd") or end == len(ids)
        found.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return found


def _reset_peak(device: torch.device) -> None:
    """Make the next reading of peak memory that of the work from here on, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
