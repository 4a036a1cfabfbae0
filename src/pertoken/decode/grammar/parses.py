"""Kernels: the parser proper. A parse is a set of (position, stack node); one step reads one byte.

Stack nodes are sets of links (return position, parent node), merged per rule and text position, so that all ways of
reading the same text share their stacks (a graph-structured stack). Nodes and parses with the same content are one and
never change: to fork a state is to copy a number, and to go back is to remember one. A call in last place hands on its
caller's links, so that right recursion needs no stack. Left recursion and empty rules are gone by then (`normal`).
"""

from __future__ import annotations

from pertoken.decode.grammar.calls import add, begin, call, come_back, look_up_calls
from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.nodes import gather
from pertoken.decode.grammar.positions import alike_bytes, full, mark_read, mix, move
from pertoken.decode.grammar.tables import (
    CALLED,
    CALLING,
    CALLS,
    CAPACITY,
    COLLECTED,
    COUNTED,
    DEAD,
    DETAIL,
    ENDS,
    FAILED,
    FINAL,
    INSIDE,
    ITEM,
    ITEMS,
    LEAVES,
    MOST_ROWS,
    NEEDS_RULE,
    NEXT,
    NO_MASK,
    NODE,
    PARSE,
    PARSE_HASH,
    PENDING,
    PLACE,
    READS,
    REASON,
    ROOT,
    RULE,
    UNKNOWN,
    USED,
)


@kernel
def close(block):
    """Number of the parse of the collected items and all that they end and call; DEAD if nothing is left."""
    items, done, flags = block[COLLECTED], 0, 0
    while True:
        while done < block[ITEMS]:
            place, node = block[items + 2 * done], block[items + 2 * done + 1]
            done += 1
            at = block[PLACE] + 10 * place
            if block[at + 2] & FINAL:
                if node == ROOT:
                    flags |= ENDS
                elif node == INSIDE:
                    flags |= LEAVES
                elif come_back(block, node) == FAILED:
                    return FAILED
            if block[at + 2] & CALLING:
                if block[at + 4] < 0 and look_up_calls(block, place) == FAILED:
                    return FAILED
                for k in range(block[at + 3], block[at + 3] + block[at + 4]):
                    code, after = block[block[CALLS] + 2 * k], block[block[CALLS] + 2 * k + 1]
                    rule, link = code, after
                    if code < 0:
                        rule, link = block[block[COUNTED] + 6 * ~code], code
                    if call(block, rule, link, node, 0) == FAILED:
                        return FAILED
        best = -1
        for i in range(block[CALLED]):
            at = block[PENDING] + 5 * i
            if not block[at + 4]:
                rule = block[at]
                if best < 0 or block[block[RULE] + 4 * rule + 2] < block[block[RULE] + 4 * best + 2]:
                    best = rule
        if best < 0:
            break
        start = block[block[RULE] + 4 * best]
        if start < 0:
            block[REASON], block[DETAIL] = NEEDS_RULE, best
            return FAILED
        node = gather(block, best)
        if node == FAILED or add(block, start, node) == FAILED:
            return FAILED
    return intern_parse(block, flags)


@kernel
def intern_parse(block, flags):
    """Number of the parse of those collected items that read a byte, with these flags; DEAD for none of both."""
    items, size = block[COLLECTED], 0
    for i in range(block[ITEMS]):
        place, node = block[items + 2 * i], block[items + 2 * i + 1]
        if not block[block[PLACE] + 10 * place + 2] & READS:
            continue
        k = size
        while k > 0 and (
            block[items + 2 * k - 2] > place or (block[items + 2 * k - 2] == place and block[items + 2 * k - 1] > node)
        ):
            block[items + 2 * k], block[items + 2 * k + 1] = block[items + 2 * k - 2], block[items + 2 * k - 1]
            k -= 1
        block[items + 2 * k], block[items + 2 * k + 1] = place, node
        size += 1
    if size == 0 and flags == 0:
        return DEAD
    value = mix(size, flags)
    for i in range(2 * size):
        value = mix(value, block[items + i])
    table, slots = block[PARSE_HASH], block[CAPACITY + PARSE_HASH] - 1
    slot = value & slots
    while block[table + slot] > 0:
        parse = block[table + slot] - 1
        at = block[PARSE] + 6 * parse
        if block[at + 4] == value and block[at + 1] == size and block[at + 2] == flags:
            same, old = True, block[ITEM] + 2 * block[at]
            for i in range(2 * size):
                if block[old + i] != block[items + i]:
                    same = False
                    break
            if same:
                return parse
        slot = (slot + 1) & slots
    if full(block, PARSE, 1) or full(block, ITEM, size):
        return FAILED
    parse, first = block[USED + PARSE], block[USED + ITEM]
    block[table + slot] = parse + 1
    at = block[PARSE] + 6 * parse
    block[at], block[at + 1], block[at + 2], block[at + 3], block[at + 4] = first, size, flags, -1, value
    block[at + 5] = NO_MASK
    for i in range(2 * size):
        block[block[ITEM] + 2 * first + i] = block[items + i]
    block[USED + PARSE] += 1
    block[USED + ITEM] += size
    return parse


@kernel
def returned(block, node):
    """Parse after the rule that was called at a node has been read; DEAD if nothing follows."""
    at = block[NODE] + 4 * node
    if block[at + 2] != UNKNOWN:
        return block[at + 2]
    begin(block)
    if come_back(block, node) == FAILED:
        return FAILED
    parse = close(block)
    if parse != FAILED:
        block[at + 2] = parse
    return parse


@kernel
def row_of(block, parse):
    """Row of NEXT that belongs to a parse; if none is free, all rows are forgotten first."""
    at = block[PARSE] + 6 * parse
    row = block[at + 3]
    if row >= 0:
        return row
    if block[USED + NEXT] >= MOST_ROWS:
        for other in range(block[USED + PARSE]):
            block[block[PARSE] + 6 * other + 3] = -1
        block[USED + NEXT] = 0
    if full(block, NEXT, 1):
        return FAILED
    row = block[USED + NEXT]
    block[USED + NEXT] += 1
    block[at + 3] = row
    first = block[NEXT] + 256 * row
    for i in range(256):
        block[first + i] = DEAD
    for i in range(block[at], block[at] + block[at + 1]):
        mark_read(block, block[block[ITEM] + 2 * i], first)
    return row


@kernel
def step(block, parse, byte):
    """Parse after one more byte; DEAD if the byte cannot come here."""
    row = row_of(block, parse)
    if row == FAILED:
        return FAILED
    known = block[block[NEXT] + 256 * row + byte]
    if known != UNKNOWN:
        return known
    at = block[PARSE] + 6 * parse
    low, high = 0, 255
    begin(block)
    for i in range(block[at], block[at] + block[at + 1]):
        here = block[ITEM] + 2 * i
        after = move(block, block[here], byte)
        if after == FAILED:
            return FAILED
        if after >= 0 and add(block, after, block[here + 1]) == FAILED:
            return FAILED
        low, high = alike_bytes(block, block[here], byte, low, high)
    result = close(block) if block[ITEMS] else DEAD
    if result != FAILED:
        for other in range(low, high + 1):
            block[block[NEXT] + 256 * row + other] = result
    return result
