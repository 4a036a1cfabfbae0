"""Regular expressions as grammars and as grammar nodes; see `regex_reader` for the notation."""

from __future__ import annotations

from collections.abc import Callable

from pertoken.decode.grammar.ir import EMPTY, Grammar, Node, Repeat, alt, seq
from pertoken.decode.grammar.regex_automaton import automaton
from pertoken.decode.grammar.regex_reader import parse
from pertoken.decode.grammar.regex_tree import Cat, Chars, Or, Regex, Times, anchored
from pertoken.decode.grammar.unicode import Ranges, characters


def regex(pattern: str) -> Grammar:
    """The texts that match a pattern as a whole. Raises `BadRequest` with the place of what is wrong or unsupported."""
    return Grammar({"root": node_of(parse(pattern), characters)})


def node_of(pattern: Regex, spell: Callable[[Ranges], Node]) -> Node:
    """The texts that match as a whole, as a grammar node. spell: how a character of a set is written."""
    if anchored(pattern):
        return automaton(pattern).node(spell)
    if isinstance(pattern, Chars):
        return spell(pattern.ranges)
    if isinstance(pattern, Cat):
        return seq(*(node_of(item, spell) for item in pattern.items))
    if isinstance(pattern, Or):
        return alt(*(node_of(item, spell) for item in pattern.items)) if pattern.items else EMPTY
    assert isinstance(pattern, Times)
    return Repeat(node_of(pattern.item, spell), pattern.least, pattern.most)
