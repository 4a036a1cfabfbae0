"""Grammars from files, by the endings of their names, and all that a model's tokenizer needs to follow one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.gbnf import gbnf
from pertoken.decode.grammar.ir import Grammar
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.lark import lark
from pertoken.decode.grammar.regex import regex
from pertoken.decode.grammar.vocabulary import Vocabulary

READERS = {".gbnf": gbnf, ".ebnf": gbnf, ".lark": lark, ".regex": lambda text: regex(text.rstrip("\r\n"))}


def read_grammar(path: Path | str) -> Grammar:
    """The grammar in a file: GBNF (.gbnf, .ebnf), Lark (.lark) or a regular expression (.regex)."""
    path = Path(path)
    if path.suffix not in READERS:
        raise BadRequest(
            f"{path}: grammar files end in {', '.join(READERS)}; a JSON Schema is given as such (--json-schema)"
        )
    return READERS[path.suffix](path.read_text("utf-8"))


def read_schema(path: Path | str) -> Grammar:
    """The grammar of a JSON Schema in a file."""
    return json_schema(Path(path).read_text("utf-8"))


def engine_for(grammar: Grammar, tokenizer: Any, model: Any) -> Engine:
    """An engine for a model's own vocabulary and ends of text."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    return Engine(grammar, Vocabulary.of(tokenizer, model.config.vocab_size, [int(end) for end in ends] or None))
