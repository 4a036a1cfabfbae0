"""Grammar engines side by side: ours, llguidance and xgrammar, on the same schemas, documents and vocabularies.

Times are CPU time of the measuring thread, so that whatever else the machine does is not counted; all engines run on
one thread and in turn. Each engine fills masks with its own function, without what an adapter adds.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pertoken.bench.claims import Bench
from pertoken.bench.schemas import schemas
from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.json_text import compact
from pertoken.decode.grammar.llguidance_adapter import LLGuidance, tokenizer_of
from pertoken.decode.grammar.matcher import Matcher
from pertoken.decode.grammar.provider import TokenMask, new_bitmask
from pertoken.decode.grammar.vocabulary import Vocabulary
from pertoken.decode.grammar.xgrammar_adapter import XGrammarMask, compiler_of

OURS, LLGUIDANCE, XGRAMMAR = "pertoken", "llguidance", "xgrammar"
SIZES = (8_000, 32_000, 128_000)


def vocabulary(bench: Bench, size: int) -> Vocabulary:
    """A vocabulary of so many byte strings: all bytes, and the commonest pieces of the standard library's source with
    all their beginnings. Texts are cut greedily, longest piece first."""

    def make() -> Vocabulary:
        counts = bench.shared("pieces", pieces)
        words = [bytes([b]) for b in range(256)] + [word for word, _ in counts.most_common(size - 257)]
        return with_greedy(words, size)

    return bench.shared(("vocabulary", size), make)


def pieces() -> Counter[bytes]:
    """How often the standard library's source has each of its pieces and their beginnings."""
    whole = Counter(re.findall(r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^A-Za-z0-9\s]+|\s+", source_text()))
    counts: Counter[bytes] = Counter()
    for piece, count in whole.items():
        data = piece.encode()[:32]
        for end in range(2, len(data) + 1):
            counts[data[:end]] += count
    return counts


def source_text() -> str:
    """Source of the standard library's modules."""
    import sysconfig
    from pathlib import Path

    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    return "\n".join(path.read_text("utf-8", "ignore") for path in paths if "site-packages" not in path.parts)


def with_greedy(words: list[bytes], size: int) -> Vocabulary:
    table, longest = {word: i for i, word in enumerate(words)}, max(map(len, words))

    def encode(text: str) -> list[int]:
        data, found, at = text.encode(), [], 0
        while at < len(data):
            length = next(n for n in range(longest, 0, -1) if data[at : at + n] in table and at + n <= len(data))
            found.append(table[data[at : at + length]])
            at += length
        return found

    return Vocabulary([*words, None], ends=(len(words),), size=max(size, len(words) + 1), encode=encode)


@dataclass
class Times:
    """Seconds: of each mask; from a schema to its first mask; refused: schemas that could not be compiled; memory:
    bytes of what a schema's tables and masks take (of our own engine)."""

    masks: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    refused: int = 0
    memory: list[int] = field(default_factory=list)

    def microseconds(self, percentile: float) -> float:
        return float(np.percentile(self.masks, percentile)) * 1e6

    def summary(self) -> dict[str, Any]:
        mask = {f"p{p}": round(self.microseconds(p), 1) for p in (50, 90, 99, 100)}
        first = {f"p{p}": round(float(np.percentile(self.first, p)) * 1e3, 2) for p in (50, 90, 99)}
        found = {"mask_us": mask, "first_mask_ms": first, "masks": len(self.masks), "refused": self.refused}
        return found | ({"memory_kb": round(float(np.mean(self.memory)) / 1024)} if self.memory else {})


Fill = Callable[[Any, np.ndarray], Any]


def fillers() -> dict[str, Fill]:
    """How each engine writes the mask of a matcher into the first row of a bitmask."""
    from llguidance.numpy import fill_next_token_bitmask

    return {
        OURS: Matcher.fill,
        LLGUIDANCE: lambda matcher, mask: fill_next_token_bitmask(matcher.inner, mask, 0),
        XGRAMMAR: lambda matcher, mask: matcher.inner.fill_next_token_bitmask(mask, 0),
    }


def starters(words: Vocabulary) -> dict[str, Callable[[Any], TokenMask]]:
    """What makes a matcher of a schema, by engine; what does not depend on the schema is made here."""
    from llguidance import LLMatcher

    tokenizer, compiler = tokenizer_of(words), compiler_of(words)
    plain = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}

    def llguidance(schema: Any) -> TokenMask:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": plain}))
        return LLGuidance(tokenizer, grammar, words)

    def xgrammar(schema: Any) -> TokenMask:
        compiled = compiler.compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=(",", ":"), strict_mode=False
        )
        return XGrammarMask(compiled, words)

    return {
        OURS: lambda schema: Matcher(Engine(json_schema(schema), words)),
        LLGUIDANCE: llguidance,
        XGRAMMAR: xgrammar,
    }


def measured(bench: Bench, size: int) -> dict[str, Times]:
    """Times of every engine over the same schemas and documents, schema by schema in turn."""

    def make() -> dict[str, Times]:
        words = vocabulary(bench, size)
        assert words.encode is not None
        makers, fills = starters(words), fillers()
        found = {name: Times() for name in makers}
        every = schemas(20 if bench.quick else 300, bench.seed)
        for number, (_, schema, document) in enumerate([every[0], *every]):
            bench.status(f"vocabulary of {size}: schema {number} of {len(every)}")
            ids = words.encode(compact(document))
            for name, start in makers.items():
                times = found[name] if number else Times()  # the first one compiles kernels and loads libraries
                timed_document(times, start, fills[name], words, schema, ids)
        return found

    return bench.shared(("grammar times", size), make)


def timed_document(
    times: Times, start: Callable[[Any], TokenMask], fill: Fill, words: Vocabulary, schema: Any, ids: list[int]
) -> None:
    """Add the times of one document's masks; an engine that refuses the schema or the document is counted."""
    mask, before = new_bitmask(1, words.size), time.thread_time()
    try:
        matcher = start(schema)
        fill(matcher, mask)
    except (BadRequest, RuntimeError, ValueError):
        times.refused += 1
        return
    times.first.append(time.thread_time() - before)
    for token in ids:
        if not matcher.accept(token):
            times.refused += 1
            return
        before = time.thread_time()
        fill(matcher, mask)
        times.masks.append(time.thread_time() - before)
    if isinstance(matcher, Matcher):
        times.memory.append(matcher.engine.bytes())
