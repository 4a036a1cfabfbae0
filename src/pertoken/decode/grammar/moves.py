"""Where the tokens of a vocabulary lead from a parse: all of them at once, by the parse that they lead to.

For those who do not read a text from left to right: a canvas that is filled in any order asks which parses can be
reached over positions that are not decided yet.
"""

from __future__ import annotations

import numpy as np

from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.tables import DEAD
from pertoken.decode.grammar.trie import SCRATCH, add_twins, set_bits
from pertoken.decode.grammar.walks import walk

MOST_BYTES = 1 << 27  # of bitmasks; beyond, they are forgotten


class Moves:
    """Moves over an engine's grammar. States are parses; text ends at `ends`."""

    def __init__(self, engine: Engine):
        self.engine = engine
        engine.pinned = True
        self.start, self.size, self.ends = engine.start, engine.vocabulary.size, engine.vocabulary.ends
        self.known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

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
            trie = engine.vocabulary.block
            count = engine.run(lambda block: walk(block, trie, state, 0, 0, 0, False))
            tokens, after = trie[trie[SCRATCH] :][:count].copy(), trie[trie[SCRATCH] + self.size :][:count].copy()
            targets, groups = np.unique(after, return_inverse=True)
            masks = np.zeros((len(targets), engine.vocabulary.words), np.int32)
            for move in range(len(targets)):
                chosen = tokens[groups == move]
                set_bits(masks[move], chosen, 0, len(chosen))
                add_twins(masks[move], trie)
            if sum(mask.nbytes for _, mask in self.known.values()) > MOST_BYTES:
                self.known.clear()
            found = self.known[state] = (targets, masks)
        return found
