"""Kernels: stack nodes, sets of links (return position, parent node, times done) that are numbered once."""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.positions import full, is_tail, mix
from pertoken.decode.grammar.tables import (
    CALLED,
    CAPACITY,
    FAILED,
    LINK,
    NODE,
    NODE_HASH,
    PENDING,
    ROOT,
    UNKNOWN,
    USED,
)


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
    while block[table + slot] > 0:
        node = block[table + slot] - 1
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
    block[table + slot] = node + 1
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
