"""Methods side by side on the same prompts: output, speed, model steps, operations, memory, and whether outputs agree.

Every side generates the same batches. One warm-up pass, then `repeats` timed passes in turn (A B C A B C ...) whose
median counts; operations are counted and decisions recorded in a further pass that is not timed. The first side is the
reference that the others' outputs are compared with: for a causal model `generate`, transformers' own plain loop; for
a diffusion model, which that loop cannot run, `dense`, one commit per step and everything computed at each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken.bench.settings import Config
from pertoken.bench.sides import (
    ARTICLE,
    DENSE,
    GRAMMAR,
    PLAIN,
    Given,
    Side,
    check_kind,
    default_baseline,
    default_beside,
    default_drafts,
    default_filter,
    make_side,
    needed,
    parts_of,
    reference,
    set_side,
)
from pertoken.bench.texts import agreement, texts
from pertoken.core import cost
from pertoken.core.attach import attach
from pertoken.core.trace import Trace
from pertoken.methods import load_methods
from pertoken.models.kind import DRAFTS, kind_of


@dataclass(frozen=True)
class Options:
    """How to generate. temperature 0 is greedy; dtype and device as in `models.load`; baseline: None for the default of
    the model's kind; batch: prompts generated together; block, steps: of a diffusion model's canvas, None for the
    methods' own; filter, language: for methods that take them; grammar, json_schema: file that says what may be written
    (see `decode.grammar.files`), at most one of the two; config: a method with settings, to be one more side."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    baseline: str | None = None
    seed: int = 0
    batch: int = 8
    repeats: int = 3
    block: int | None = None
    steps: int | None = None
    filter: str | None = None
    language: str | None = None
    grammar: str | None = None
    json_schema: str | None = None
    config: Config | None = None

    def __post_init__(self) -> None:
        if self.grammar and self.json_schema:
            raise ValueError("a grammar and a JSON Schema were given; give one of them")
        for name in ("max_new_tokens", "batch", "repeats", "block", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
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
    speedup: tokens per second relative to the baseline; identical: same ids as the reference's, None where sampled;
    agreement: share of positions with the same token as the reference's, None where sampled.
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
    agreement: float | None = None


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


def load_model(name: str, options: Options) -> tuple[Any, Any]:
    from pertoken.models.load import load

    return load(name, options.dtype, options.device)


@dataclass(frozen=True)
class Setup:
    """What the sides of a comparison share. names: the reference, the baseline and what was asked for; drafts: names of
    the models that draft; batches: prompts as left-padded ids and masks; options: with the baseline named."""

    model: Any
    tokenizer: Any
    kind: str
    names: list[str]
    drafts: list[str]
    given: Given
    engine: Any
    batches: list[dict[str, Tensor]]
    options: Options


def set_up(
    names: list[str],
    model_name: str,
    draft_name: str | None,
    prompts: list[str],
    options: Options,
    status: Callable[[str], None] = lambda text: None,
) -> Setup:
    """Load what methods with these names need on this model, and check that all of it fits together, as `compare`
    says."""
    load_methods()
    asked = [name for name in (options.baseline, *names) if name not in (None, PLAIN, DENSE)]
    if options.config is not None and options.config.method != DENSE:
        asked.append(options.config.method)
    for name in asked:
        parts_of(name)
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty; give each some text to go on from")
    status(f"loading {model_name}")
    model, tokenizer = load_model(model_name, options)
    kind = kind_of(model)
    baseline = options.baseline or default_baseline(kind)
    options, wanted = replace(options, baseline=baseline), list(dict.fromkeys([reference(kind), baseline, *names]))
    for name in wanted:
        check_kind(name, kind, model_name)
    if options.config is not None and options.config.method != DENSE:
        check_kind(options.config.method, kind, model_name, attached=True)
    if kind != "diffusion" and (options.block or options.steps):
        raise ValueError(f"block and steps are settings of a canvas; {model_name} is {ARTICLE[kind]} {kind} model")
    every = [*wanted, *asked]
    drafts, draft_names = _drafts(every, model_name, draft_name, tokenizer, options)
    beside = default_beside(model_name, every)
    given = Given(drafts, tokenizer, options.filter, beside, options.language, options.block, options.steps)
    engine = _engine(asked, kind, model, tokenizer, options, status)
    if engine is not None and kind == "diffusion":
        from pertoken.decode.grammar.moves import Moves
        from pertoken.denoise.grammar_canvas import GrammarCanvas

        given = replace(given, constraint=GrammarCanvas(Moves(engine)))
    if options.filter is None and kind == "diffusion":
        given = replace(given, filter=default_filter(model_name, every, given.places(options.max_new_tokens)))
    batches = [
        tokenizer(prompts[i : i + options.batch], return_tensors="pt", padding=True, padding_side="left")
        for i in range(0, len(prompts), options.batch)
    ]
    batches = [{k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")} for batch in batches]
    _check_room(model, batches, options)
    return Setup(model, tokenizer, kind, wanted, draft_names, given, engine, batches, options)


def _drafts(
    names: list[str], model_name: str, draft_name: str | None, tokenizer: Any, options: Options
) -> tuple[dict[str, Any], list[str]]:
    """Draft models by kind, and their names: the one that was asked for, and the zoo's own where more are needed."""
    kinds = {kind for need, kind in DRAFTS.items() if needed(need, names)}
    chosen, drafts, found = default_drafts(model_name, names), {}, []
    if draft_name is not None:
        model, own = load_model(draft_name, options)
        kind = next(iter(kinds)) if len(kinds) == 1 else kind_of(model)  # a wrong one is refused by its method
        _check_tokenizers(tokenizer, own, model_name, draft_name, more=kind == "diffusion")
        drafts[kind], found = model, [draft_name]
    for kind, name in chosen.items():
        if kind not in drafts:
            drafts[kind], own = load_model(name, options)
            _check_tokenizers(tokenizer, own, model_name, name, more=kind == "diffusion")
            found.append(name)
    return drafts, found


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
    setup = set_up(names, model_name, draft_name, prompts, options, status)
    options, model, tokenizer, batches = setup.options, setup.model, setup.tokenizer, setup.batches
    sides = [make_side(name, setup.kind, setup.given) for name in setup.names]
    if options.config is not None and options.config.method not in setup.names:
        sides.append(set_side(options.config.method, options.config.settings, setup.kind, setup.given))
    if setup.kind == "causal":
        for side in sides:
            side.engine = setup.engine
    comparison = Comparison(model_name, ", ".join(setup.drafts) or None, prompts, options)
    seconds = _time(sides, model, tokenizer, batches, options, status)
    flops, traces = {}, {}
    for side in sides:
        status(f"counting operations: {side.name}")
        flops[side.name], traces[side.name] = _count(side, model, tokenizer, batches, options)
    comparison.runs = _figures(sides, seconds, flops, options)
    runs = [asdict(run) for run in comparison.runs]
    for side in sides:
        comparison.outputs[side.name] = tokenizer.batch_decode(side.rows, skip_special_tokens=True)
        for trace in traces[side.name]:
            trace.about |= {"model": model_name, "runs": runs}
            comparison.traces.append(trace)
    return comparison


def _engine(
    names: list[str], kind: str, model: Any, tokenizer: Any, options: Options, status: Callable[[str], None]
) -> Any:
    """What follows the grammar that was asked for, if one was."""
    wanted = options.grammar or options.json_schema
    if wanted is None:
        if any("+" in name and GRAMMAR in name.split("+") for name in names):
            raise ValueError(f"{GRAMMAR} beside another method needs a grammar: give --grammar or --json-schema")
        return None
    if kind not in ("causal", "diffusion"):
        raise ValueError(f"a grammar is followed by causal and by diffusion models; this one is an {kind} model")
    from pertoken.decode.grammar.files import engine_for, read_grammar, read_schema

    status("preparing the grammar (the very first use compiles its parser, up to a minute)")
    return engine_for(read_grammar(wanted) if options.grammar else read_schema(wanted), tokenizer, model)


def processor(engine: Any) -> Any:
    """A logits processor for one call that keeps texts in the engine's grammar, spelled as the tokenizer spells."""
    from pertoken.decode.grammar.matcher import Matcher
    from pertoken.decode.grammar.processor import GrammarProcessor

    return GrammarProcessor(lambda: Matcher(engine), engine.vocabulary.size, canonical=True)


def _check_tokenizers(tokenizer: Any, draft: Any, model_name: str, draft_name: str, more: bool) -> None:
    """more: whether the draft may have tokens of its own behind the model's, such as a mask."""
    one, other = tokenizer.get_vocab(), draft.get_vocab()
    if more:
        other = {token: number for token, number in other.items() if token in one or number <= max(one.values())}
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


def generated(
    side: Side,
    model: Any,
    tokenizer: Any,
    batch: dict[str, Tensor],
    options: Options,
    traces: Sequence[Trace | None] = (),
) -> list[list[int]]:
    """New ids of each row, to the end of text inclusive, or its whole text if tokens go anywhere; adds the side's steps
    and tokens. traces: of its policies' decisions, one for each."""
    torch.manual_seed(options.seed)
    extra: dict[str, Any] = {} if side.decoder is None else {"custom_generate": side.decoder}
    if side.engine is not None:
        extra["logits_processor"] = [processor(side.engine)]
    forwards = [0]
    with ExitStack() as stack:
        for policy, trace in zip_longest(side.policies, traces):
            stack.enter_context(attach(model, policy, trace=trace))
        if side.decoder is None:
            counter = model.register_forward_pre_hook(lambda module, args: forwards.__setitem__(0, forwards[0] + 1))
            stack.callback(counter.remove)
        ids = model.generate(**batch, **extra, **options.arguments(tokenizer.pad_token_id))
    side.steps += forwards[0] if side.decoder is None else int(side.decoder.stats.steps)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
    if side.whole:
        side.tokens += int(extra["custom_generate"].stats.tokens)
        padding = (batch["attention_mask"] == 0).sum(-1).tolist()
        return [_stripped(row[left:], tokenizer.pad_token_id) for row, left in zip(ids.tolist(), padding, strict=True)]
    rows = [_to_end(row, ends) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]
    side.tokens += sum(map(len, rows))
    return rows


def _to_end(row: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


def _stripped(row: list[int], pad: int | None) -> list[int]:
    """Without the padding at its end."""
    last = next((i for i in reversed(range(len(row))) if row[i] != pad), -1)
    return row[: last + 1]


def _pass(side: Side, model: Any, tokenizer: Any, batches: list[dict[str, Tensor]], options: Options) -> None:
    side.steps = side.tokens = 0
    _reset_peak(model.device)
    rows = [generated(side, model, tokenizer, batch, options) for batch in batches]
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


def _count(side: Side, model: Any, tokenizer: Any, batches: list, options: Options) -> tuple[int, list[Trace]]:
    """Operations of one pass, and what was decided in its first batch, with the texts of that very pass: a trace of the
    decoder, and one of every policy. A policy that only drafts is recorded in a pass of its own, attached alone."""
    traces: list[Trace] = []
    rows: list[list[int]] = []
    kept = (side.steps, side.tokens, side.peak_bytes)

    def work() -> None:
        for number, batch in enumerate(batches):
            with ExitStack() as stack:
                decided: list[Trace] = []
                if number == 0:
                    if side.decoder is not None:
                        traces.append(stack.enter_context(side.decoder.record()))
                        traces[0].about["method"] = side.name
                    decided = [Trace({"method": _part(side, policy)}) for policy in side.policies]
                    traces.extend(decided)
                made = generated(side, model, tokenizer, batch, options, decided)
            if number == 0:
                rows.extend(made)

    flops = cost.count_flops(work)
    side.steps, side.tokens, side.peak_bytes = kept
    for trace in traces:
        trace.about |= texts(trace, tokenizer, batches[0], rows)
        if side.whole:
            for row in trace.about["rows"]:
                row["prompt"] = []
    if side.alone is not None:
        attached = Side(f"{side.name}, attached", "", policies=(side.alone,), engine=side.engine)
        decided = [Trace({"method": attached.name})]
        rows = generated(attached, model, tokenizer, batches[0], options, decided)
        decided[0].about |= texts(decided[0], tokenizer, batches[0], rows)
        traces += decided
    return flops, [trace for trace in traces if trace.steps]


def _part(side: Side, policy: Any) -> str:
    """The name of what a policy decided within a side."""
    return side.name if side.decoder is None else f"{side.name}: {type(policy).__name__}"


def _figures(sides: list[Side], seconds: dict[str, float], flops: dict[str, int], options: Options) -> list[Run]:
    speed = {side.name: side.tokens / max(seconds[side.name], 1e-9) for side in sides}
    base = speed[options.baseline or sides[0].name]
    return [
        Run(
            name=side.name,
            label=side.label,
            seconds=seconds[side.name],
            tokens=side.tokens,
            tokens_per_second=speed[side.name],
            steps=side.steps,
            flops=flops[side.name],
            peak_bytes=side.peak_bytes,
            speedup=speed[side.name] / max(base, 1e-9),
            identical=None if options.temperature else side.rows == sides[0].rows,
            agreement=None if options.temperature else agreement(side.rows, sides[0].rows),
        )
        for side in sides
    ]


def _reset_peak(device: torch.device) -> None:
    """Make the next reading of peak memory that of the work from here on, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
