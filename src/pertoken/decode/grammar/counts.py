"""Kernels: parses that differ only in counts which no token can exhaust have one mask.

A repetition takes at least one byte, so a token of at most `longest` bytes cannot tell apart counts that are further
than that from both bounds. `alike` replaces them by one representative, near the top of the stack. The mask inside a
string of up to 10,000 characters is then found once, and not for every character.
"""

from __future__ import annotations

from pertoken.decode.grammar.calls import add, begin
from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.nodes import intern_node
from pertoken.decode.grammar.parses import intern_parse
from pertoken.decode.grammar.positions import full
from pertoken.decode.grammar.tables import (
    COUNTED,
    FAILED,
    ITEM,
    LINK,
    NODE,
    PARSE,
    ROOT,
    UNKNOWN,
    USED,
    WORK,
)

LEVELS = 4  # of the stack that are looked at


@kernel
def alike(block, parse, longest):
    """A parse with the same mask, the same one for as many as possible."""
    at = block[PARSE] + 6 * parse
    first, size, flags = block[at], block[at + 1], block[at + 2]
    begin(block)
    for i in range(first, first + size):
        place, node = block[block[ITEM] + 2 * i], block[block[ITEM] + 2 * i + 1]
        node = alike_node(block, node, longest)
        if node == FAILED or add(block, place, node) == FAILED:
            return FAILED
    return intern_parse(block, flags)


@kernel
def alike_node(block, node, longest):
    """A stack node with representative counts, as far down as the stack has one way."""
    path, depth, here = block[WORK], 0, node
    while here > ROOT and depth < LEVELS:
        block[path + depth] = here
        depth += 1
        at = block[NODE] + 4 * here
        if block[at + 1] != 1:
            break
        here = block[block[LINK] + 3 * block[at] + 1]
    found = node if depth == 0 else UNKNOWN
    while depth > 0:
        depth -= 1
        found = recounted(block, block[path + depth], longest, found)
        if found == FAILED:
            return FAILED
    return found


@kernel
def recounted(block, node, longest, parent):
    """A stack node with representative counts on its links, and another parent for its only link (UNKNOWN: none)."""
    at = block[NODE] + 4 * node
    first, count = block[at], block[at + 1]
    if full(block, LINK, count):
        return FAILED
    new = block[USED + LINK]
    for i in range(count):
        old, here = block[LINK] + 3 * (first + i), block[LINK] + 3 * (new + i)
        code, above, times = block[old], block[old + 1], block[old + 2]
        if code < 0:
            counted = block[COUNTED] + 6 * ~code
            least, most = block[counted + 1], block[counted + 2]
            if most < 0 or most - times > longest:
                times = least if times >= least else max(times, least - longest - 1)
        block[here], block[here + 1], block[here + 2] = code, above if parent == UNKNOWN else parent, times
    return intern_node(block, new, count)
