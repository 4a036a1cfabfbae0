"""Kernels: which tokens may come next, and what comes after them.

A mask is the union over the items of a parse: of the split of each item's position, or of the repetition that it is in,
the tokens that are allowed in any case, and those below its exits that can be read from what follows the item's rule.
A bitmask has bit i % 32 of word i // 32 set for an allowed token i.
"""

from __future__ import annotations

from pertoken.decode.grammar.calls import add, begin
from pertoken.decode.grammar.compiled import kernel, numbers_at
from pertoken.decode.grammar.counts import alike
from pertoken.decode.grammar.parses import close, intern_parse, returned, step
from pertoken.decode.grammar.positions import full
from pertoken.decode.grammar.repeats import repetition
from pertoken.decode.grammar.splits import make_split
from pertoken.decode.grammar.tables import (
    ABOUT,
    COUNTED,
    DEAD,
    DETAIL,
    EDGE,
    ENDS,
    FAILED,
    ITEM,
    LINK,
    MASK,
    NEEDS_REPEAT,
    NO_MASK,
    NO_SPLIT,
    NODE,
    PARSE,
    PLACE,
    REASON,
    REPEATS,
    ROOT,
    RULE,
    SET,
    SPLIT,
    STATE,
    USED,
    WALKED,
)
from pertoken.decode.grammar.trie import (
    ENDS_COUNT,
    ENDS_OF_TEXT,
    LONGEST,
    SCRATCH,
    SHARED,
    SIZE,
    STARTS,
    TEXT,
    add_twins,
    set_bits,
)
from pertoken.decode.grammar.walks import walk

WORTH_KEEPING = 8  # a mask that took walks below so many exits


@kernel
def fill(block_address, trie_address, parse, mask_address):
    """Write the mask of a parse, ends of text included; 0, DEAD if no token may come next, or FAILED. The blocks and
    the mask are given by their addresses. A mask that took long walks is kept in MASK; those of parses that `counts`
    finds alike are one."""
    block, trie = numbers_at(block_address), numbers_at(trie_address)
    words = (trie[SIZE] + 31) // 32
    mask = numbers_at(mask_address)[:words]
    at, same = block[PARSE] + 6 * parse, parse
    if block[at + 5] == NO_MASK and block[USED + COUNTED]:
        same = alike(block, parse, trie[LONGEST])
        if same == FAILED:
            return FAILED
    other = block[PARSE] + 6 * same
    if block[other + 5] == NO_MASK:
        block[WALKED] = 0
        found = add_items(block, trie, other, mask)
        if found != 0 or block[WALKED] < WORTH_KEEPING:
            return found
        if full(block, MASK, words):
            return FAILED
        where = block[MASK] + block[USED + MASK]
        for word in range(words):
            block[where + word] = mask[word]
        block[other + 5] = block[USED + MASK]
        block[USED + MASK] += words
    else:
        where = block[MASK] + block[other + 5]
        for word in range(words):
            mask[word] = block[where + word]
    block[at + 5] = block[other + 5]
    return 0


@kernel
def add_items(block, trie, at, mask):
    """Set the mask of a parse, given by its address; 0, DEAD if nothing is allowed, or FAILED."""
    mask[:] = 0
    allowed = 0
    for i in range(block[at], block[at] + block[at + 1]):
        place, node = block[block[ITEM] + 2 * i], block[block[ITEM] + 2 * i + 1]
        counted = repetition(block, node)
        if counted >= 0:
            more = add_repeat(block, trie, counted, place, node, mask)
        else:
            more = add_split(block, trie, place, node, mask)
        if more == FAILED:
            return FAILED
        allowed += more
    add_twins(mask, trie)
    if block[at + 2] & ENDS:
        set_bits(mask, trie, trie[ENDS_OF_TEXT], trie[ENDS_COUNT])
        allowed += trie[ENDS_COUNT]
    return 0 if allowed else DEAD


@kernel
def add_split(block, trie, place, node, mask):
    """Allow what can be read from a position with a stack node below; FAILED, or a number that is 0 if that is
    nothing."""
    split = block[block[PLACE] + 10 * place + 5]
    if split == NO_SPLIT:
        split = make_split(block, trie, place)
        if split == FAILED:
            return FAILED
    home, where = (block, block[SPLIT] + split) if split >= 0 else (trie, trie[SHARED] - 2 - split)
    count, exits = home[where], home[where + 1]
    where += 2
    if count < 0:
        count = len(mask)
        for word in range(count):
            mask[word] |= home[where + word]
    else:
        set_bits(mask, home, where, count)
    more = add_exits(block, trie, node, home, where + count, exits, mask)
    return FAILED if more == FAILED else count + more


@kernel
def add_exits(block, trie, node, home, first, count, mask):
    """Allow what can be read below exits `home[first : first + count]` once the rule called at a node has ended;
    returns how many tokens, or FAILED."""
    if node <= ROOT or count == 0:
        return 0
    block[WALKED] += count
    after = returned(block, node)
    if after == FAILED:
        return FAILED
    if after == DEAD or block[block[PARSE] + 6 * after + 1] == 0:
        return 0
    allowed = 0
    for k in range(first, first + count):
        found = walk(block, trie, after, home[k], 0, 0, False)
        if found == FAILED:
            return FAILED
        set_bits(mask, trie, trie[SCRATCH], found)
        allowed += found
    return allowed


@kernel
def add_repeat(block, trie, counted, place, node, mask):
    """Allow what can be read from a position inside of a repetition (see `repeats`); FAILED, or a number that is 0 if
    that is nothing."""
    at, here = block[COUNTED] + 6 * counted, block[LINK] + 3 * block[block[NODE] + 4 * node]
    link = block[at + 4]
    while link >= 0 and block[block[REPEATS] + 3 * link] != place:
        link = block[block[REPEATS] + 3 * link + 2]
    if link < 0:
        block[REASON], block[DETAIL], block[ABOUT] = NEEDS_REPEAT, counted, place
        return FAILED
    split, parent, times = block[block[REPEATS] + 3 * link + 1], block[here + 1], block[here + 2]
    home, where = (block, block[SPLIT] + split) if split >= 0 else (trie, trie[SHARED] - 2 - split)
    most, inside, behind = home[where], home[where + 1], home[where + 2]
    sums, first = where + 4, where + 4 + 3 * (most + 2)
    left = most if block[at + 2] < 0 else min(most, block[at + 2] - times)
    least = max(block[at + 1] - times, 1)
    words, fit, scratch = first + inside + behind + home[where + 3], home[sums + left + 1], trie[SCRATCH]
    allowed = fit
    block[WALKED] += WORTH_KEEPING
    if 2 * fit < inside:
        set_bits(mask, home, first, fit)
    else:
        for word in range(len(mask)):
            trie[scratch + word] = home[words + word]
        for i in range(first + fit, first + inside):
            token = home[i]
            trie[scratch + (token >> 5)] &= ~(1 << (token & 31))
        for word in range(len(mask)):
            mask[word] |= trie[scratch + word]
    if least > left:
        return allowed
    sums, first = sums + most + 2, first + inside
    fit = home[sums + left + 1] - home[sums + least]
    allowed += fit
    set_bits(mask, home, first + home[sums + least], fit)
    sums, first = sums + most + 2, first + behind
    fit = home[sums + left + 1] - home[sums + least]
    more = add_exits(block, trie, parent, home, first + home[sums + least], fit, mask)
    return FAILED if more == FAILED else allowed + more


@kernel
def read(block, trie, parse, token):
    """Parse after all bytes of a token; DEAD if it cannot come here."""
    start, text = trie[STARTS] + token, trie[TEXT]
    for i in range(text + trie[start], text + trie[start + 1]):
        parse = step(block, parse, trie[i] & 255)
        if parse < 0:
            return parse
    return parse


@kernel
def read_bytes(block, data, parse):
    """Parse after bytes `data` (uint8), how many of them were read, and the parse after those."""
    for i in range(len(data)):
        after = step(block, parse, data[i] & 255)
        if after < 0:
            return after, i, parse
        parse = after
    return parse, len(data), parse


@kernel
def only_byte(block, parse):
    """The one byte that can come next, if the sentence cannot end here and there is but one; else -1."""
    at = block[PARSE] + 6 * parse
    single = -1
    if block[at + 2]:
        return -1
    for item in range(block[at], block[at] + block[at + 1]):
        place = block[PLACE] + 10 * block[block[ITEM] + 2 * item]
        for i in range(block[place], block[place] + block[place + 1]):
            state = block[STATE] + 4 * block[block[SET] + i]
            for edge in range(block[state], block[state + 1]):
                here = block[EDGE] + 3 * edge
                if block[here] < 0:
                    continue
                if block[here] != block[here + 1] or (single >= 0 and single != block[here]):
                    return -1
                single = block[here]
    return single


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
    at = block[PARSE] + 6 * parse
    for i in range(block[at], block[at] + block[at + 1]):
        add(block, block[block[ITEM] + 2 * i], block[block[ITEM] + 2 * i + 1])
    return intern_parse(block, ENDS)
