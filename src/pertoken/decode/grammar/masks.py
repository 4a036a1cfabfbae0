"""Kernels: which tokens may come next.

A position's tokens are found once, by walking the vocabulary's trie with a parse that knows only its rule (`INSIDE`
below it): tokens read to their end are allowed whatever the stack is; where the rule can end within a token, the trie
node is kept as an *exit*, and its subtree is walked with the real stack each time (the context-dependent tokens). All
others are rejected. A mask is the union over the parse's items.

A bitmask has bit i % 32 of word i // 32 set for an allowed token i.
"""

from __future__ import annotations

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.parses import add, begin, close, intern_parse, returned, step
from pertoken.decode.grammar.positions import full
from pertoken.decode.grammar.tables import (
    CAPACITY,
    DEAD,
    DETAIL,
    ENDS,
    ENTRY,
    EXITS,
    FAILED,
    INSIDE,
    ITEM,
    LEAVES,
    NEEDS_ENTRY,
    NEEDS_SLOT,
    NEXT,
    PARSE,
    PATH,
    PLACE,
    REASON,
    ROOT,
    RULE,
    SLOTS,
    TOKENS,
    UNKNOWN,
    USED,
)


@kernel
def build_trie(text, lengths, ids, nodes, same):
    """Trie of the sorted tokens whose bytes are joined in `text`: `nodes` `[3, node]` gets byte + depth * 256, the node
    after the subtree, and the token; returns the number of nodes."""
    count, start, before = 0, 0, 0
    path = [0] * (lengths.max() + 1)
    depth = 0
    for i in range(len(ids)):
        length = lengths[i]
        shared = 0
        if i > 0:
            while shared < length and shared < lengths[i - 1] and text[start + shared] == text[before + shared]:
                shared += 1
        while depth > shared:
            nodes[1, path[depth]] = count
            depth -= 1
        if shared == length:  # the same bytes again
            last = nodes[2, path[depth]]
            while same[last] >= 0:
                last = same[last]
            same[last] = ids[i]
        while depth < length:
            depth += 1
            path[depth] = count
            nodes[0, count] = text[start + depth - 1] + 256 * depth
            nodes[2, count] = ids[i] if depth == length else -1
            count += 1
        before = start
        start += length
    while depth > 0:
        nodes[1, path[depth]] = count
        depth -= 1
    return count


@kernel
def walk(block, trie, parse, first, last, found, count, leaving):
    """Append to `found` the tokens of trie nodes `first` to `last` that can be read from a parse; returns how many
    there are then. `leaving`: note exits (in EXITS) too."""
    heads, afters, tokens = trie[0], trie[1], trie[2]
    path, parses, rows = block[PATH], block[PARSE], block[NEXT]
    exits, used = block[EXITS], block[USED + EXITS]
    room = block[CAPACITY + EXITS]
    if first >= last:
        return count
    block[path + (trie[heads + first] >> 8) - 1] = parse
    node = first
    while node < last:
        head = trie[heads + node]
        byte, depth = head & 255, head >> 8
        here = block[path + depth - 1]
        row = block[parses + 5 * here + 3]
        after = UNKNOWN
        if row >= 0:
            after = block[rows + 256 * row + byte]
        if after == UNKNOWN:
            after = step(block, here, byte)
            if after == FAILED:
                return FAILED
        if after == DEAD:
            node = trie[afters + node]
            continue
        token = trie[tokens + node]
        if token >= 0:
            found[count] = token
            count += 1
        at = parses + 5 * after
        if leaving and block[at + 2] & LEAVES and trie[afters + node] > node + 1:
            if used >= room:
                block[REASON] = EXITS
                return FAILED
            block[exits + used] = node
            used += 1
        if block[at + 1] == 0:
            node = trie[afters + node]
        else:
            block[path + depth] = after
            node += 1
    if leaving:
        block[USED + EXITS] = used
    return count


@kernel
def set_bits(mask, trie, found, count):
    """Allow tokens `found[:count]` and all that spell the same."""
    same = trie[3]
    for i in range(count):
        token = found[i]
        while token >= 0:
            mask[token >> 5] |= 1 << (token & 31)
            token = trie[same + token]


@kernel
def only_item(block, place):
    """Parse of a position alone, with nothing known below it, before it ends or calls anything."""
    begin(block)
    if add(block, place, INSIDE) == FAILED:
        return FAILED
    return intern_parse(block, 0)


@kernel
def make_entry(block, trie, pool, place, found):
    """Find a position's tokens and exits; FAILED or the number of the entry. Long lists of tokens become bitmasks in
    pool `[slot, word]`."""
    slots = block[SLOTS]
    parse = only_item(block, place)
    if parse == FAILED:
        return FAILED
    exits = block[USED + EXITS]
    count = walk(block, trie, parse, 0, trie[6], found, 0, True)
    if count == FAILED:
        return FAILED
    size = block[USED + EXITS] - exits
    block[USED + EXITS] = exits
    wide = count > max(pool.shape[1] // 8, 64)
    if full(block, ENTRY, 1) or (not wide and full(block, TOKENS, count)):
        return FAILED
    if wide and slots >= len(pool):
        block[REASON] = NEEDS_SLOT
        return FAILED
    entry = block[USED + ENTRY]
    at = block[ENTRY] + 4 * entry
    if wide:
        pool[slots, :] = 0
        set_bits(pool[slots], trie, found, count)
        block[at] = ~slots
        block[SLOTS] = slots + 1
    else:
        first = block[USED + TOKENS]
        for i in range(count):
            block[block[TOKENS] + first + i] = found[i]
        block[at] = first
        block[USED + TOKENS] += count
    block[at + 1], block[at + 2], block[at + 3] = count, exits, size
    block[USED + EXITS] += size
    block[USED + ENTRY] += 1
    block[block[PLACE] + 8 * place + 5] = entry
    return entry


@kernel
def fill(block, trie, pool, parse, mask, found):
    """Set the mask of a parse; 0, or FAILED."""
    at = block[PARSE] + 5 * parse
    first, size = block[at], block[at + 1]
    for i in range(size):
        place = block[block[ITEM] + 2 * (first + i)]
        here = block[PLACE] + 8 * place
        if block[here + 5] < 0:
            if block[block[RULE] + 4 * block[here + 7] + 3]:  # shared between grammars
                block[REASON], block[DETAIL] = NEEDS_ENTRY, place
                return FAILED
            if make_entry(block, trie, pool, place, found) == FAILED:
                return FAILED
    mask[:] = 0
    for i in range(size):
        here = block[ITEM] + 2 * (first + i)
        place, node = block[here], block[here + 1]
        entry = block[ENTRY] + 4 * block[block[PLACE] + 8 * place + 5]
        start, count = block[entry], block[entry + 1]
        if start < 0:
            slot = pool[~start]
            for word in range(len(mask)):
                mask[word] |= slot[word]
        else:
            tokens = block[TOKENS] + start
            set_bits(mask, trie, block[tokens : tokens + count], count)
        if node <= ROOT or block[entry + 3] == 0:
            continue
        after = returned(block, node)
        if after == FAILED:
            return FAILED
        if after == DEAD or block[block[PARSE] + 5 * after + 1] == 0:
            continue
        for k in range(block[entry + 2], block[entry + 2] + block[entry + 3]):
            exit_ = block[block[EXITS] + k]
            count = walk(block, trie, after, exit_ + 1, trie[trie[1] + exit_], found, 0, False)
            if count == FAILED:
                return FAILED
            set_bits(mask, trie, found, count)
    return 0


@kernel
def read(block, trie, parse, token):
    """Parse after all bytes of a token; DEAD if it cannot come here."""
    start, text = trie[4], trie[5]
    for i in range(trie[start + token], trie[start + token + 1]):
        parse = step(block, parse, trie[text + i])
        if parse < 0:
            return parse
    return parse


@kernel
def read_bytes(block, data, parse):
    """Parse after bytes `data` (uint8), how many of them were read, and the parse after those."""
    for i in range(len(data)):
        after = step(block, parse, data[i])
        if after < 0:
            return after, i, parse
        parse = after
    return parse, len(data), parse


@kernel
def only_byte(block, parse):
    """The one byte that can come next, if the sentence cannot end here and there is but one; else -1. FAILED too."""
    at = block[PARSE] + 5 * parse
    if block[at + 2]:
        return -1
    single = -1
    for i in range(block[at], block[at] + block[at + 1]):
        place = block[block[ITEM] + 2 * i]
        here = block[PLACE] + 8 * place
        for byte in range(256):
            if single != byte and _reads(block, here, byte):
                if single >= 0:
                    return -1
                single = byte
    return single


@kernel
def _reads(block, place, byte):
    """Whether a state of a position (given by its address) has an edge over a byte."""
    from_, number = block[place], block[place + 1]
    for i in range(number):
        state = block[0] + 4 * block[block[5] + from_ + i]
        for edge in range(block[state], block[state + 1]):
            at = block[1] + 3 * edge
            if block[at] <= byte <= block[at + 1] and block[at] >= 0:
                return True
    return False


@kernel
def first_parse(block, rule, empty):
    """Parse before the first byte; `empty`: whether the root rule matches the empty text."""
    begin(block)
    start = block[block[RULE] + 4 * rule]
    if start < 0:
        return intern_parse(block, ENDS)
    if add(block, start, ROOT) == FAILED:
        return FAILED
    parse = close(block)
    if parse == FAILED or not empty:
        return parse
    begin(block)
    at = block[PARSE] + 5 * parse
    for i in range(block[at], block[at] + block[at + 1]):
        add(block, block[block[ITEM] + 2 * i], block[block[ITEM] + 2 * i + 1])
    return intern_parse(block, ENDS)
