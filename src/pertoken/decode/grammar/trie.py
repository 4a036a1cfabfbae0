"""A vocabulary's memory: one block of int32 with its trie and what grammars know of it in common; and its kernels.

The trie lies level by level. Node 0 is the root; the children of node n are nodes FIRSTS[n] to FIRSTS[n + 1] - 1, in
the order of their bytes, so that those of one node lie side by side and a walk in depth goes through every level once,
from left to right. HEADS[n] is the byte that leads to a node, plus 256 * (token + 1) if a token ends there. Of the ids
that spell the same, one is in the trie, and TWINS has a pair (that one, other) for each of the others.

`block[table]` is where a table begins. SCRATCH is memory for kernels to work in: `[size]` tokens, `[size]` numbers that
go with them, `[nodes]` nodes and `[nodes]` numbers. SHARED is a heap of splits that any grammar may use (see `splits`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pertoken.decode.grammar.compiled import kernel

(HEADS, FIRSTS, TWINS, STARTS, TEXT, ENDS_OF_TEXT, SCRATCH, SHARED) = range(8)  # where these tables begin
(PAIRS, NODES, SIZE, ENDS_COUNT, LONGEST, USED_SHARED, ROOM_SHARED) = range(8, 15)  # numbers
HEAD = 16


def lay_out(spelled: Sequence[tuple[bytes, int]], size: int, ends: Sequence[int]) -> np.ndarray:
    """The block of a vocabulary of `size` ids; spelled: (bytes, id), sorted."""
    lengths = np.fromiter((len(b) for b, _ in spelled), np.int32, len(spelled))
    ids = np.fromiter((i for _, i in spelled), np.int32, len(spelled))
    text = np.frombuffer(b"".join(b for b, _ in spelled), np.uint8)
    levels = np.zeros(int(lengths.max()) + 2, np.int32)
    count_nodes(text, lengths, levels)
    nodes = int(levels.sum()) + 1
    starts = np.cumsum(np.concatenate([[1], levels[1:-1]]), dtype=np.int32)  # first node of depths 1, 2, ...
    heads, firsts, twins = np.zeros(nodes, np.int32), np.zeros(nodes + 1, np.int32), np.zeros(2 * len(ids), np.int32)
    pairs = build_trie(text, lengths, ids, starts, heads, firsts, twins)
    begins = np.zeros(size + 1, np.int32)
    begins[ids + 1] = lengths
    spelling = np.frombuffer(b"".join(b for b, _ in sorted(spelled, key=lambda entry: entry[1])), np.uint8)
    parts = [heads, firsts, twins[: 2 * pairs], np.cumsum(begins), spelling, np.asarray(ends, np.int32)]
    parts.append(np.zeros(2 * (size + nodes) + 64, np.int32))
    offsets = np.cumsum([HEAD, *map(len, parts)])
    block = np.zeros(int(offsets[-1]), np.int32)
    block[: len(offsets)] = offsets
    for offset, part in zip(offsets, parts, strict=False):
        block[offset : offset + len(part)] = part
    block[PAIRS : LONGEST + 1] = pairs, nodes, size, len(ends), lengths.max()
    return block


@kernel
def count_nodes(text, lengths, levels):
    """Add up in `levels` `[depth]` how many nodes the trie of sorted tokens has at each depth."""
    start, before = 0, 0
    for i in range(len(lengths)):
        shared = common(text, start, lengths[i], before, lengths[i - 1]) if i > 0 else 0
        for depth in range(shared + 1, lengths[i] + 1):
            levels[depth] += 1
        before = start
        start += lengths[i]


@kernel
def common(text, start, length, other, size):
    """How many bytes two tokens begin with in common."""
    shared = 0
    while shared < length and shared < size and text[start + shared] == text[other + shared]:
        shared += 1
    return shared


@kernel
def build_trie(text, lengths, ids, starts, heads, firsts, twins):
    """Fill in the trie of sorted tokens; `starts` `[depth - 1]` is the first node of each depth. Returns the number of
    twins."""
    start, before, pairs = 0, 0, 0
    path = [0] * (lengths.max() + 1)
    for i in range(len(ids)):
        length = lengths[i]
        shared = common(text, start, length, before, lengths[i - 1]) if i > 0 else 0
        for depth in range(shared + 1, length + 1):
            node = starts[depth - 1]
            starts[depth - 1] += 1
            heads[node] = text[start + depth - 1]
            firsts[path[depth - 1]] += 1
            path[depth] = node
        if shared == length:  # the same bytes again
            twins[2 * pairs] = (heads[path[length]] >> 8) - 1
            twins[2 * pairs + 1] = ids[i]
            pairs += 1
        else:
            heads[path[length]] |= (ids[i] + 1) << 8
        before = start
        start += length
    total = 1
    for node in range(len(heads)):
        count = firsts[node]
        firsts[node] = total
        total += count
    firsts[len(heads)] = total
    return pairs


@kernel
def child(trie, first, last, byte):
    """Which of the nodes from `first` to `last` - 1, children of one node, has this byte; -1 for none."""
    heads, low, high = trie[HEADS], first, last
    while low < high:
        middle = (low + high) >> 1
        if trie[heads + middle] & 255 < byte:
            low = middle + 1
        else:
            high = middle
    return low if low < last and trie[heads + low] & 255 == byte else -1


@kernel
def set_bits(mask, tokens, first, count):
    """Allow `tokens[first : first + count]`."""
    for i in range(first, first + count):
        token = tokens[i]
        mask[token >> 5] |= 1 << (token & 31)


@kernel
def add_twins(mask, trie):
    """Allow all ids that spell the same as allowed ones."""
    first = trie[TWINS]
    for at in range(first, first + 2 * trie[PAIRS], 2):
        token, other = trie[at], trie[at + 1]
        if (mask[token >> 5] >> (token & 31)) & 1:
            mask[other >> 5] |= 1 << (other & 31)


@kernel
def only_bit(mask):
    """The only token that a mask allows, or -1."""
    found = -1
    for word in range(len(mask)):
        bits = mask[word] & 0xFFFFFFFF
        if bits == 0:
            continue
        if found >= 0 or bits & (bits - 1):
            return -1
        found = 32 * word
        while not bits & 1:
            bits >>= 1
            found += 1
    return found
