"""Claims of grammars: right masks, their cost beside other engines, and what they do to decoding.

Schemas and documents are made by program (`schemas`); the models are the zoo's code models, asked for JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pertoken.bench import diffusion, suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.compare import processor
from pertoken.bench.grammar_engines import LLGUIDANCE, OURS, SIZES, XGRAMMAR, measured, starters, vocabulary
from pertoken.bench.schemas import schemas
from pertoken.core.errors import BadRequest
from pertoken.decode.dyspec import DySpec
from pertoken.decode.grammar.apply import forbid
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.files import engine_for
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.json_text import compact
from pertoken.decode.grammar.provider import bits, new_bitmask
from pertoken.decode.grammar.vocabulary import Vocabulary
from pertoken.decode.xgrammar import XGrammar
from pertoken.zoo import model_path

TOYS = {
    'root ::= root "+" term | term\nterm ::= "a" | "(" root ")"': "a+()",
    'root ::= "a" root "b" | root root | ""': "ab",
    'root ::= x "é" x | "a"\nx ::= [é-ê]? "a"{0,3}': "aé",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{1,12}$"},
        "line": {"type": "integer", "minimum": 0, "maximum": 9999},
        "kind": {"enum": ["function", "class", "module"]},
        "tags": {"type": "array", "items": {"enum": ["public", "private", "async"]}, "maxItems": 3},
    },
    "required": ["name", "line", "kind", "tags"],
    "additionalProperties": False,
}
LENGTH = 64


@claim("xgrammar", claim="Masks on toy vocabularies are those of trying every token", metric="share of equal masks",
       expected="== 1")  # fmt: skip
def brute_force(bench: Bench) -> Measurement:
    same = total = 0
    for source, letters in TOYS.items():
        data = letters.encode()
        words = [bytes(w) for n in (1, 2) for w in itertools.product(data, repeat=n)]
        engine = Engine(gbnf(source), Vocabulary([*words, None], ends=(len(words),)))
        longest = 6 if bench.quick else 9

        def prefix(text: bytes, engine: Engine = engine) -> bool:
            return engine.read_bytes(engine.start, text)[0] >= 0

        for n in range(longest - 2):
            for letters_ in itertools.islice(itertools.product(data, repeat=n), 2000):
                text = bytes(letters_)
                if prefix(text):
                    parse = engine.read_bytes(engine.start, text)[0]
                    wanted = {i for i, word in enumerate(words) if prefix(text + word)}
                    wanted |= {len(words)} if engine.ends(parse) else set()
                    same += set(np.flatnonzero(bits(engine.mask(parse), len(words) + 1)).tolist()) == wanted
                    total += 1
    return Measurement(same / total, "every token tried", 1.0, total)


@claim("xgrammar", claim="Where masks along documents differ from llguidance's, a validator finds no fault with ours",
       metric="tokens allowed that lead to no valid document", expected="== 0", compare="value")  # fmt: skip
def as_llguidance(bench: Bench) -> Measurement:
    """Masks with one token on llguidance's side are left out: it allows one of several spellings of forced text."""
    words = vocabulary(bench, SIZES[0])
    makers, found = starters(words), Differences()
    assert words.encode is not None
    for family, schema, document in schemas(20 if bench.quick else 300, bench.seed):
        try:
            ours, theirs = makers[OURS](schema), makers[LLGUIDANCE](schema)
        except BadRequest:
            found.refused += 1
            continue
        text = b""
        for token in words.encode(compact(document)):
            masks = new_bitmask(2, words.size)
            ours.fill(masks, 0)
            theirs.fill(masks, 1)
            found.compare(family, schema, text, masks, words)
            read = ours.accept(token), theirs.accept(token)
            if not all(read):
                found.stopped += 1
                break
            text += words.spells(token)
    detail = {name: value for name, value in vars(found).items() if name != "wrong"}
    return Measurement(found.wrong, "llguidance", found.missing, found.masks, detail)


@dataclass
class Differences:
    """masks: compared; forced: left out; wrong: tokens that only we allow and that lead to no valid document; missing:
    tokens that only we allow and that do; theirs: tokens that only llguidance allows; refused: schemas that one of the
    two refuses; stopped: documents that one of the two leaves before their end."""

    masks: int = 0
    forced: int = 0
    equal: int = 0
    wrong: int = 0
    missing: int = 0
    theirs: int = 0
    refused: int = 0
    stopped: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def compare(self, family: str, schema: Any, text: bytes, masks: np.ndarray, words: Vocabulary) -> None:
        ours, theirs = bits(masks, words.size)
        if theirs.sum() == 1:
            self.forced += 1
            return
        self.masks += 1
        self.equal += bool((ours == theirs).all())
        self.theirs += int((theirs & ~ours).sum())
        for token in np.flatnonzero(ours & ~theirs)[:3]:
            whole = completed(schema, text + words.spells(int(token)))
            good = whole is not None and valid(whole, schema)
            self.missing += good
            self.wrong += not good
            if not good or len(self.examples) < 40:
                shown, piece = text[-30:].decode(errors="replace"), repr(words.spells(int(token)))
                self.examples.append({"family": family, "after": shown, "token": piece, "whole": str(whole)[-60:]})


CLOSERS = b'"]}0:,-etfn1' + bytes(range(32, 127)) + bytes(range(128, 256))


def completed(schema: Any, text: bytes) -> str | None:
    """A document that begins with `text`, made by closing whatever can be closed; None if that leads nowhere."""
    engine = Engine(json_schema(schema), Vocabulary([bytes([b]) for b in range(256)]))
    parse, _ = engine.read_bytes(engine.start, text)
    draw = random.Random(0)
    for number in range(4000):
        if parse < 0 or engine.ends(parse):
            return text.decode() if parse >= 0 else None
        lost = number > 100 and draw.random() < 0.5  # in a circle: try anything
        for byte in draw.sample(CLOSERS, len(CLOSERS)) if lost else CLOSERS:
            after, _ = engine.read_bytes(parse, bytes([byte]))
            if after >= 0:
                parse, text = after, text + bytes([byte])
                break
        else:
            return None
    return None


def sizes(bench: Bench) -> tuple[int, ...]:
    return SIZES[:1] if bench.quick else SIZES


def worst(bench: Bench, baseline: str, of: Any) -> Measurement:
    """The vocabulary on which we compare worst with a baseline."""
    found = {size: measured(bench, size) for size in sizes(bench)}
    size = max(found, key=lambda size: of(found[size][OURS]) / of(found[size][baseline]))
    detail = {str(size): {name: times.summary() for name, times in sides.items()} for size, sides in found.items()}
    sides = found[size]
    return Measurement(of(sides[OURS]), baseline, of(sides[baseline]), len(sides[OURS].masks), {"by_size": detail})


@claim("xgrammar", claim="A mask costs no more than xgrammar's in the median, at every size of vocabulary",
       metric="microseconds", expected="<= 1")  # fmt: skip
def median_mask(bench: Bench) -> Measurement:
    return worst(bench, XGRAMMAR, lambda times: times.microseconds(50))


@claim("xgrammar", claim="The dearest hundredth of masks costs no more than llguidance's, at every size of vocabulary",
       metric="microseconds", expected="<= 1")  # fmt: skip
def dear_mask(bench: Bench) -> Measurement:
    return worst(bench, LLGUIDANCE, lambda times: times.microseconds(99))


@claim("xgrammar", claim="The first mask of a schema comes no later than llguidance's, at every size of vocabulary",
       metric="milliseconds, median", expected="<= 1")  # fmt: skip
def first_mask(bench: Bench) -> Measurement:
    return worst(bench, LLGUIDANCE, lambda times: statistics.median(times.first) * 1e3)


@claim("xgrammar", claim="Applying a mask to logits costs no more than with xgrammar's or llguidance's own function",
       metric="microseconds", expected="<= 1")  # fmt: skip
def applying(bench: Bench) -> Measurement:
    """In place, on float32 logits on the CPU: masks of few tokens, of half of them and of nearly all, in turn."""
    from llguidance.numpy import apply_token_bitmask_inplace
    from xgrammar import apply_token_bitmask_inplace as xgrammar_apply

    size, rounds = SIZES[-1], 100 if bench.quick else 1000
    times: dict[str, list[float]] = {OURS: [], XGRAMMAR: [], LLGUIDANCE: [], "masked_fill": []}
    generator = np.random.default_rng(bench.seed)
    for share in (0.001, 0.5, 0.99):
        allowed = generator.random(size) < share
        mask = np.packbits(allowed, bitorder="little").view(np.int32)
        row, keep, scores = torch.from_numpy(mask)[None], torch.from_numpy(allowed), torch.randn(1, size)
        ways: dict[str, Any] = {
            OURS: lambda scores=scores, mask=mask: forbid(scores[0], mask, size),
            XGRAMMAR: lambda scores=scores, row=row: xgrammar_apply(scores, row),
            LLGUIDANCE: lambda scores=scores, mask=mask: apply_token_bitmask_inplace(scores.numpy(), mask[None]),
            "masked_fill": lambda scores=scores, keep=keep: scores.masked_fill(~keep, -torch.inf),
        }
        for number in range(rounds + 1):
            for name, way in ways.items():
                before = time.thread_time()
                way()
                if number:  # the first one compiles
                    times[name].append(time.thread_time() - before)
    means = {name: statistics.mean(some) * 1e6 for name, some in times.items()}
    best = min((XGRAMMAR, LLGUIDANCE), key=lambda name: means[name])
    detail = {"vocabulary": size, "microseconds": {name: round(value, 1) for name, value in means.items()}}
    return Measurement(means[OURS], best, means[best], 3 * rounds, detail)


def valid(text: str, schema: Any) -> bool:
    from jsonschema import ValidationError, validate

    try:
        validate(json.loads(text), schema)
    except (ValueError, ValidationError):
        return False
    return True


def prompts(bench: Bench) -> list[str]:
    return [f"{text}\nrecord = " for text in suite.texts(bench, 64, 6)]


def written(bench: Bench, label: str, decoder: Any, constrained: bool) -> tuple[list[list[int]], list[str], float, Any]:
    """Ids and texts that the code model writes with a decoder, seconds, and the decoder's counts."""

    def make() -> Any:
        from pertoken.models.load import load

        model, tokenizer = bench.shared("grammar model", lambda: load("zoo:code-target", "fp32"))
        engine = bench.shared("grammar engine", lambda: engine_for(json_schema(SCHEMA), tokenizer, model))
        ids, seconds, forced, tokens, steps = [], 0.0, 0, 0, 0
        for number, prompt in enumerate([*prompts(bench)[:1], *prompts(bench)]):
            inputs = tokenizer([prompt[-600:]], return_tensors="pt")
            extra = {"logits_processor": [processor(engine)]} if constrained else {}
            before = time.perf_counter()
            out = suite.generate(model, dict(inputs), LENGTH, decoder, **extra)[0].tolist()
            if number:  # the first one warms up
                seconds += time.perf_counter() - before
                ids.append(out)
                tokens += len(out)
                if decoder is not None:
                    forced, steps = forced + decoder.stats.forced, steps + decoder.stats.steps
        return ids, tokenizer.batch_decode(ids, skip_special_tokens=True), seconds, (forced, tokens, steps)

    return bench.shared(("written", label), make)


def plain(bench: Bench) -> Any:
    return written(bench, "plain", None, True)


@claim("xgrammar", claim="All that the code model writes under a schema is valid; without, nearly nothing is",
       metric="share of valid texts", expected="== 1", compare="value")  # fmt: skip
def all_valid(bench: Bench) -> Measurement:
    texts = plain(bench)[1]
    free = written(bench, "free", None, False)[1]
    share, alone = (sum(valid(text, SCHEMA) for text in some) / len(some) for some in (texts, free))
    return Measurement(share, "no grammar", alone, len(texts), {"example": texts[0]})


START = """
import sys, time
from transformers import AutoTokenizer
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.vocabulary import Vocabulary
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
begun = time.perf_counter()
engine = Engine(json_schema({"type": "array", "items": {"type": "string"}}), Vocabulary.of(tokenizer))
engine.mask(engine.start)
print(time.perf_counter() - begun)
"""


@claim(
    "xgrammar",
    claim="Only the first grammar on a machine waits for the compiler: a later process needs less than a tenth of that",
    metric="seconds from a tokenizer and a schema to the first mask",
    expected="< 0.1",
)
def compiled_once(bench: Bench) -> Measurement:
    with TemporaryDirectory() as kept:
        places = os.environ | {"NUMBA_CACHE_DIR": kept}
        started = [sys.executable, "-c", START, str(model_path("code-target"))]
        first, *later = [
            float(subprocess.run(started, env=places, capture_output=True, text=True, check=True).stdout)
            for _ in range(4)
        ]
    return Measurement(statistics.median(later), "the first time", first, len(later))


def faster(bench: Bench, label: str, decoder: Any) -> Measurement:
    ids, _, seconds, (forced, tokens, steps) = written(bench, label, decoder, True)
    base = plain(bench)
    same = sum(one == other for one, other in zip(ids, base[0], strict=True)) / len(ids)
    detail = {"identical": same, "forced": forced, "tokens": tokens, "steps": steps}
    speed = tokens / seconds if same == 1 else 0.0
    return Measurement(speed, "generate under the same grammar", base[3][1] / base[2], len(ids), detail)


@claim("xgrammar", claim="Skipping forced tokens writes the same text faster", metric="tokens/s", expected=">= 1.3")
def jumping(bench: Bench) -> Measurement:
    return faster(bench, "xgrammar", XGrammar())


@claim("xgrammar", claim="Trees of guesses under a grammar write the same text faster", metric="tokens/s",
       expected=">= 1.3")  # fmt: skip
def trees(bench: Bench) -> Measurement:
    from pertoken.models.load import load

    draft, _ = bench.shared("grammar draft", lambda: load("zoo:code-draft", "fp32"))
    return faster(bench, "dyspec", DySpec(draft))


@claim("xgrammar", claim="More than a tenth of the tokens of JSON are forced", metric="share of tokens",
       expected="> 0.1", compare="value")  # fmt: skip
def forced_share(bench: Bench) -> Measurement:
    ids, _, _, (forced, tokens, _) = written(bench, "xgrammar", XGrammar(), True)
    return Measurement(forced / tokens, "no forced tokens", 0.0, len(ids))


@claim("xgrammar", claim="All that the diffusion model fills in under a schema is valid; without, not all is",
       metric="share of valid texts", expected="== 1", compare="value")  # fmt: skip
def canvas_valid(bench: Bench) -> Measurement:
    from pertoken.decode.grammar.moves import Moves
    from pertoken.denoise.grammar_canvas import GrammarCanvas
    from pertoken.denoise.loop import Denoise
    from pertoken.denoise.threshold import Threshold

    about = diffusion.loaded(bench)
    engine = engine_for(json_schema(SCHEMA), about.tokenizer, about.model)
    canvas = GrammarCanvas(Moves(engine))
    shares = []
    for constraint in (canvas, None):
        texts = []
        for prompt in prompts(bench):
            decoder = Denoise(commit=Threshold(), constraint=constraint)
            ids = suite.generate(about.model, about.batch([prompt[-600:]]), LENGTH, decoder)
            texts += about.tokenizer.batch_decode(ids, skip_special_tokens=True)
        shares.append(sum(valid(text, SCHEMA) for text in texts) / len(texts))
    return Measurement(shares[0], "no grammar", shares[1], len(prompts(bench)))
