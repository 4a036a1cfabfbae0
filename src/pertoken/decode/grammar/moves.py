"""Where the tokens of a vocabulary lead from a parse: all of them at once, by the parse that they lead to.

For those who do not read a text from left to right: a canvas that is filled in any order asks which parses can be
reached over positions that are not decided yet.
"""

from __future__ import annotations

import numpy as np

from pertoken.decode.grammar.compiled import kernel
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.masks import set_bits
from pertoken.decode.grammar.parses import step
from pertoken.decode.grammar.tables import DEAD, FAILED, PARSE, PATH

MOST_BYTES = 1 << 27  # of bitmasks; beyond, they are forgotten


class Moves:
    """Moves over an engine's grammar. States are parses; text ends at `ends`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        engine.pinned = True
        self.start, self.size, self.ends = engine.start, engine.vocabulary.size, engine.vocabulary.ends
        self.known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.tokens, self.targets = np.zeros(self.size, np.int32), np.zeros(self.size, np.int32)

    def complete(self, state: int) -> bool:
        """Whether a sentence may end here."""
        return self.engine.ends(state)

    def read(self, state: int, token: int) -> int:
        """State after a token; negative if it may not come."""
        return self.engine.read(state, token) if self.engine.vocabulary.spells(token) else DEAD

    def after(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """States that one token leads to `[move]`, and which tokens do, as bitmasks `[move, word]`."""
        found = self.known.get(state)
        if found is None:
            engine = self.engine
            count = engine.run(lambda block: _walk(block, engine.trie, state, self.tokens, self.targets))
            targets, groups = np.unique(self.targets[:count], return_inverse=True)
            masks = np.zeros((len(targets), engine.vocabulary.words), np.int32)
            for move in range(len(targets)):
                tokens = self.tokens[:count][groups == move]
                set_bits(masks[move], engine.trie, tokens, len(tokens))
            if sum(mask.nbytes for _, mask in self.known.values()) > MOST_BYTES:
                self.known.clear()
            found = self.known[state] = (targets, masks)
        return found


@kernel
def _walk(block, trie, parse, tokens, targets):
    """Tokens that can be read from a parse and the parses after them; their number, or FAILED."""
    heads, afters, ids = trie[0], trie[1], trie[2]
    path, count, node, last = block[PATH], 0, 0, trie[6]
    block[path] = parse
    while node < last:
        head = trie[heads + node]
        depth = head >> 8
        after = step(block, block[path + depth - 1], head & 255)
        if after == FAILED:
            return FAILED
        if after == DEAD:
            node = trie[afters + node]
            continue
        token = trie[ids + node]
        if token >= 0:
            tokens[count], targets[count] = token, after
            count += 1
        if block[block[PARSE] + 5 * after + 1] == 0:
            node = trie[afters + node]
        else:
            block[path + depth] = after
            node += 1
    return count
