"""Claims of DEL: exact, as good as the best fixed setting of each domain without knowing it, and faster than
generate."""

from __future__ import annotations

import random
from typing import Any
from unicodedata import name

from pertoken.bench import suite
from pertoken.bench.claims import Bench, Measurement, claim
from pertoken.bench.exactness import claim_exact, claim_laws
from pertoken.decode.del_ import DEL
from pertoken.decode.full import Full

EXITS = (1, 2, 3, 4, 5)
LENGTHS = (1, 2, 3, 4, 6)


def self_speculation(models: suite.Pair) -> DEL:
    return DEL()


claim_exact("del", self_speculation, lambda models: DEL(fixed=(2, 3)))
claim_laws("del", {"DEL": self_speculation, "DEL at a fixed exit": lambda models: DEL(fixed=(2, 2))}, (0.6, 1.0))


def domains(bench: Bench) -> dict[str, list[str]]:
    """Held-out code, and two kinds of tables: random digits in Python syntax, easy structure around what nobody can
    guess; and random character maps as the standard library's encodings write them, long runs that shallow layers
    know."""
    count = 4 if bench.quick else 24
    rng, tables = random.Random(bench.seed), []
    for _ in range(count):
        rows = [f"    ({', '.join(str(rng.randrange(10)) for _ in range(4))})," for _ in range(8)]
        tables.append("\n".join(["TABLE = [", *rows, ""]))
    letters = [chr(0x410 + i) for i in range(64)]
    maps = []
    for _ in range(count):
        rows = [f"    0x{rng.randrange(128, 256):04x}: 0x{ord(c):04x},  #  {name(c)}" for c in rng.sample(letters, 9)]
        maps.append("\n".join(["decoding_map.update({", *rows, ""]))
    return {"code": suite.texts(bench, count, count), "digits": tables, "maps": maps}


def loads(bench: Bench, domain: str, decoder: DEL) -> tuple[int, int]:
    """Tokens and layer-loads of one decoder on a domain, greedy, one prompt at a time."""

    def measure() -> tuple[int, int]:
        models, tokens, layers = suite.pair(bench), 0, 0
        for text in domains(bench)[domain]:
            suite.generate(models.target, models.batch([text]), 32 if bench.quick else 96, decoder)
            tokens, layers = tokens + decoder.stats.tokens, layers + decoder.stats.layer_loads
        return tokens, layers

    return bench.shared(("layer loads", domain, repr(decoder)), measure)


def grid(bench: Bench) -> dict[tuple[int, int], dict[str, tuple[int, int]]]:
    """Every fixed (exit, length) on both domains."""
    exits, lengths = (EXITS[1:4], LENGTHS[:3]) if bench.quick else (EXITS, LENGTHS)
    settings = [(e, d) for e in exits for d in lengths]
    return {s: {domain: loads(bench, domain, DEL(fixed=s)) for domain in domains(bench)} for s in settings}


def rate(*parts: tuple[int, int]) -> float:
    """Tokens per layer-load over several domains together."""
    return sum(tokens for tokens, _ in parts) / sum(layers for _, layers in parts)


def against_best_fixed(bench: Bench, domain: str) -> Measurement:
    found = {setting: rate(parts[domain]) for setting, parts in grid(bench).items()}
    best = max(found, key=lambda setting: found[setting])
    plain = 1 / suite.pair(bench).target.config.num_hidden_layers
    detail = {"best fixed (exit, length)": best, "plain decoding": plain}
    value = rate(loads(bench, domain, DEL()))
    return Measurement(value, "best fixed (exit, length)", found[best], len(domains(bench)[domain]), detail)


@claim(
    "del",
    claim="On code DEL reaches the best fixed pair of exit and length, found with hindsight",
    metric="tokens per layer-load",
    expected=">= 0.95",
    shown=True,
)
def best_on_code(bench: Bench) -> Measurement:
    return against_best_fixed(bench, "code")


@claim(
    "del",
    claim="On digit tables DEL reaches the best fixed pair of exit and length, found with hindsight",
    metric="tokens per layer-load",
    expected=">= 0.95",
)
def best_on_digits(bench: Bench) -> Measurement:
    return against_best_fixed(bench, "digits")


@claim(
    "del",
    claim="On character maps DEL reaches the best fixed pair of exit and length, found with hindsight",
    metric="tokens per layer-load",
    expected=">= 0.95",
)
def best_on_maps(bench: Bench) -> Measurement:
    return against_best_fixed(bench, "maps")


def on_mixture(bench: Bench, *mixed: str) -> Measurement:
    found = {setting: rate(*(parts[domain] for domain in mixed)) for setting, parts in grid(bench).items()}
    best = max(found, key=lambda setting: found[setting])
    value = rate(*(loads(bench, domain, DEL()) for domain in mixed))
    count = sum(len(domains(bench)[domain]) for domain in mixed)
    return Measurement(value, "best single fixed pair", found[best], count, {"best single (exit, length)": best})


@claim(
    "del",
    claim="On a mixture of code and character maps DEL beats every single fixed pair",
    metric="tokens per layer-load",
    expected="> 1",
    shown=True,
)
def best_on_code_and_maps(bench: Bench) -> Measurement:
    return on_mixture(bench, "code", "maps")


@claim(
    "del",
    claim="On a mixture of code and digit tables DEL beats every single fixed pair",
    metric="tokens per layer-load",
    expected="> 1",
    shown=True,
)
def best_on_code_and_digits(bench: Bench) -> Measurement:
    return on_mixture(bench, "code", "digits")


@claim(
    "del",
    claim="DEL commits more tokens per layer-load than plain decoding on code",
    metric="tokens per layer-load",
    expected="> 1",
)
def beats_plain(bench: Bench) -> Measurement:
    plain = 1 / suite.pair(bench).target.config.num_hidden_layers
    return Measurement(rate(loads(bench, "code", DEL())), "full", plain, len(domains(bench)["code"]))


def speeds(bench: Bench) -> dict[str, dict[str, Any]]:
    """DEL, plain decoding in the same loop, and generate, batch 1, each at its fastest dtype and setting."""

    def run() -> dict[str, dict[str, Any]]:
        new = 48 if bench.quick else 128
        groups: dict[str, list[suite.Side]] = {"generate": [], "full": [], "del": []}
        for dtype in ("fp32", "bf16"):
            target = suite.pair(bench, dtype).target
            settings = {"generate": [None], "full": [Full()], "del": [DEL(), DEL(probe=4), DEL(bounded=True, probe=4)]}
            for group, decoders in settings.items():
                for decoder in decoders:
                    work = lambda i, t=target, d=decoder: suite.generate(t, i, new, d)  # noqa: E731
                    groups[group].append(suite.Side(f"{decoder or group} {dtype}", work))
        models = suite.pair(bench)
        return suite.race(groups, [models.batch([text]) for text in suite.texts(bench, 27, 6)])

    return bench.shared("del speeds", run)


@claim(
    "del",
    claim="DEL is at least 1.2x as fast as plain generate (batch 1, each side at its fastest dtype and settings)",
    metric="tokens per second",
    expected=">= 1.2",
    shown=True,
)
def faster_than_generate(bench: Bench) -> Measurement:
    return suite.ratio_of(speeds(bench), "del", "generate")


@claim(
    "del",
    claim="DEL is faster than plain decoding in the same loop",
    metric="tokens per second",
    expected="> 1",
)
def faster_than_full(bench: Bench) -> Measurement:
    return suite.ratio_of(speeds(bench), "del", "full")
