"""Kernels: the parser proper. A parse is a set of (position, stack node); one step reads one byte.

Stack nodes are sets of links (return position, parent node), merged per rule and text position, so that all ways of
reading the same text share their stacks (a graph-structured stack). Nodes and parses with the same content are one and
never change: to fork a state is to copy a number, and to go back is to remember one. A call in last place hands on its
caller's links, so that right recursion needs no stack. Left recursion and empty rules are gone by then (`normal`).
"""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.positions import full, is_tail, look_up_calls, mix, move
from pertoken.decode.grammar.tables import (
    AMBIGUOUS,
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
    LINK,
    MOST_ITEMS,
    MOST_ROWS,
    NEEDS_RULE,
    NEXT,
    NODE,
    NODE_HASH,
    PARSE,
    PARSE_HASH,
    PENDING,
    PLACE,
    READS,
    REASON,
    ROOT,
    RULE,
    SEEN,
    STAMP,
    UNKNOWN,
    USED,
)


@kernel
def begin(block):
    """Start collecting the items of a parse (in COLLECTED)."""
    block[STAMP] += 1
    block[ITEMS] = 0
    block[CALLED] = 0


@kernel
def add(block, place, node):
    """Collect an item once; FAILED if there are too many."""
    slots, seen, items = block[CAPACITY + SEEN] - 1, block[SEEN], block[COLLECTED]
    stamp = block[STAMP]
    slot = mix(mix(7, place), node) & slots
    while block[seen + 2 * slot] == stamp:
        other = block[seen + 2 * slot + 1]
        if block[items + 2 * other] == place and block[items + 2 * other + 1] == node:
            return 0
        slot = (slot + 1) & slots
    count = block[ITEMS]
    if count >= MOST_ITEMS or 2 * count > slots:
        block[REASON] = AMBIGUOUS
        return FAILED
    block[seen + 2 * slot], block[seen + 2 * slot + 1] = stamp, count
    block[items + 2 * count], block[items + 2 * count + 1] = place, node
    block[ITEMS] = count + 1
    return 0


@kernel
def call(block, rule, code, node, times):
    """Note that a rule is called with this link."""
    count = block[CALLED]
    if count >= block[CAPACITY + PENDING]:
        if count >= 8 * MOST_ITEMS:
            block[REASON] = AMBIGUOUS
        else:
            block[REASON] = PENDING
        return FAILED
    at = block[PENDING] + 5 * count
    block[at], block[at + 1], block[at + 2], block[at + 3], block[at + 4] = rule, code, node, times, 0
    block[CALLED] = count + 1
    return 0


@kernel
def come_back(block, node):
    """Collect what follows when the rule that was called at a node has been read."""
    at = block[NODE] + 4 * node
    for link in range(block[at], block[at] + block[at + 1]):
        here = block[LINK] + 3 * link
        code, parent, times = block[here], block[here + 1], block[here + 2]
        if code >= 0:
            if add(block, code, parent) == FAILED:
                return FAILED
            continue
        counted = block[COUNTED] + 4 * ~code
        least, most = block[counted + 1], block[counted + 2]
        times += 1
        if (most < 0 or times < most) and call(
            block, block[counted], code, parent, times if most >= 0 else min(times, least)
        ) == FAILED:
            return FAILED
        if times >= least and add(block, block[counted + 3], parent) == FAILED:
            return FAILED
    return 0


@kernel
def less(block, one, other):
    """Whether a link comes before another."""
    for i in range(3):
        if block[one + i] != block[other + i]:
            return block[one + i] < block[other + i]
    return False


@kernel
def intern_node(block, first, count):
    """Number of the node whose links are the last `count` of LINK, from `first` on; they stay only if it is new."""
    links = block[LINK]
    for i in range(first + 1, first + count):
        code, parent, times = block[links + 3 * i], block[links + 3 * i + 1], block[links + 3 * i + 2]
        k = i
        while k > first:
            at = links + 3 * (k - 1)
            before = code < block[at] or (
                code == block[at] and (parent < block[at + 1] or (parent == block[at + 1] and times < block[at + 2]))
            )
            if not before:
                break
            block[at + 3], block[at + 4], block[at + 5] = block[at], block[at + 1], block[at + 2]
            k -= 1
        at = links + 3 * k
        block[at], block[at + 1], block[at + 2] = code, parent, times
    size = 1
    for i in range(first + 1, first + count):
        at, last = links + 3 * i, links + 3 * (first + size - 1)
        if less(block, last, at):
            for k in range(3):
                block[last + 3 + k] = block[at + k]
            size += 1
    value = size
    for i in range(3 * first, 3 * (first + size)):
        value = mix(value, block[links + i])
    table, slots = block[NODE_HASH], block[CAPACITY + NODE_HASH] - 1
    slot = value & slots
    while block[table + slot] >= 0:
        node = block[table + slot]
        at = block[NODE] + 4 * node
        if block[at + 3] == value and block[at + 1] == size:
            same, old = True, links + 3 * block[at]
            for i in range(3 * size):
                if block[old + i] != block[links + 3 * first + i]:
                    same = False
                    break
            if same:
                return node
        slot = (slot + 1) & slots
    if full(block, NODE, 1):
        return FAILED
    node = block[USED + NODE]
    block[table + slot] = node
    at = block[NODE] + 4 * node
    block[at], block[at + 1], block[at + 2], block[at + 3] = first, size, UNKNOWN, value
    block[USED + NODE] += 1
    block[USED + LINK] = first + size
    return node


@kernel
def gather(block, rule):
    """Node of all links that a rule was called with and that are not done yet."""
    first, count = block[USED + LINK], 0
    for i in range(block[CALLED]):
        at = block[PENDING] + 5 * i
        if block[at + 4] or block[at] != rule:
            continue
        code, node, times = block[at + 1], block[at + 2], block[at + 3]
        if code >= 0 and node > ROOT and is_tail(block, code):
            parent = block[NODE] + 4 * node
            more = block[parent + 1]
            if full(block, LINK, count + more):
                return FAILED
            for k in range(3 * more):
                block[block[LINK] + 3 * (first + count) + k] = block[block[LINK] + 3 * block[parent] + k]
            count += more
        else:
            if full(block, LINK, count + 1):
                return FAILED
            here = block[LINK] + 3 * (first + count)
            block[here], block[here + 1], block[here + 2] = code, node, times
            count += 1
    node = intern_node(block, first, count)
    if node != FAILED:
        for i in range(block[CALLED]):
            at = block[PENDING] + 5 * i
            if block[at] == rule:
                block[at + 4] = 1
    return node


@kernel
def close(block):
    """Number of the parse of the collected items and all that they end and call; DEAD if nothing is left."""
    items, done, flags = block[COLLECTED], 0, 0
    while True:
        while done < block[ITEMS]:
            place, node = block[items + 2 * done], block[items + 2 * done + 1]
            done += 1
            at = block[PLACE] + 8 * place
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
                        rule, link = block[block[COUNTED] + 4 * ~code], code
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
        if not block[block[PLACE] + 8 * place + 2] & READS:
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
    while block[table + slot] >= 0:
        parse = block[table + slot]
        at = block[PARSE] + 5 * parse
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
    block[table + slot] = parse
    at = block[PARSE] + 5 * parse
    block[at], block[at + 1], block[at + 2], block[at + 3], block[at + 4] = first, size, flags, -1, value
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
    at = block[PARSE] + 5 * parse
    row = block[at + 3]
    if row >= 0:
        return row
    if block[USED + NEXT] >= MOST_ROWS:
        for other in range(block[USED + PARSE]):
            block[block[PARSE] + 5 * other + 3] = -1
        block[USED + NEXT] = 0
    if full(block, NEXT, 1):
        return FAILED
    row = block[USED + NEXT]
    block[USED + NEXT] += 1
    block[at + 3] = row
    for i in range(256):
        block[block[NEXT] + 256 * row + i] = UNKNOWN
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
    at = block[PARSE] + 5 * parse
    begin(block)
    for i in range(block[at], block[at] + block[at + 1]):
        here = block[ITEM] + 2 * i
        after = move(block, block[here], byte)
        if after == FAILED:
            return FAILED
        if after >= 0 and add(block, after, block[here + 1]) == FAILED:
            return FAILED
    result = close(block) if block[ITEMS] else DEAD
    if result != FAILED:
        block[block[NEXT] + 256 * row + byte] = result
    return result
