"""A vocabulary as bytes: what each token id spells, with its trie (see `trie`).

Ids that spell nothing (special tokens, padding of the model's head) are never allowed by a grammar; the ids that end a
text are allowed where a sentence may end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.trie import ROOM_SHARED, SHARED, USED_SHARED, lay_out

MOST_BYTES = 4096
MOST_SHARED = 1 << 24  # int32 of splits that grammars have in common
MOST_SIZE = 1 << 22
KNOWN: WeakKeyDictionary[Any, dict[Any, Vocabulary]] = WeakKeyDictionary()  # by tokenizer


@dataclass(eq=False)
class Vocabulary:
    """tokens: what each id spells (None or empty: nothing); ends: ids that end a text; size: of the model's head, at
    least as many as tokens; encode: text -> ids in the tokenizer's own (canonical) way, for forced text.

    shared: splits that several grammars have in common, by what they are of; see `sharing`.
    """

    tokens: Sequence[bytes | None]
    ends: tuple[int, ...] = ()
    size: int = 0
    encode: Callable[[str], list[int]] | None = None
    shared: dict[bytes, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.size = self.size or len(self.tokens)
        if self.size < len(self.tokens):
            raise BadRequest(
                f"size={self.size} is less than the {len(self.tokens)} tokens given; give the width of the logits"
            )
        if self.size > MOST_SIZE:
            raise BadRequest(f"size={self.size} is too large; vocabularies of up to {MOST_SIZE} tokens are supported")
        bad = [end for end in self.ends if not 0 <= end < self.size]
        if bad:
            raise BadRequest(
                f"ends={bad} are outside the vocabulary of {self.size}; give ids that the model can choose"
            )
        ends = set(self.ends)
        spelled = [(b, i) for i, b in enumerate(self.tokens) if b and i not in ends]
        if not spelled:
            raise BadRequest("no token of the vocabulary spells anything; give the bytes of each id")
        longest = max(len(b) for b, _ in spelled)
        if longest > MOST_BYTES:
            raise BadRequest(f"a token of {longest} bytes is too long; at most {MOST_BYTES} are supported")
        spelled.sort()
        self.longest = longest
        self.words = (self.size + 31) // 32
        self.block = lay_out(spelled, self.size, self.ends)
        self.address = self.block.ctypes.data

    def share(self, key: bytes, record: np.ndarray) -> int | None:
        """Keep a split for all grammars under a key; its number, or None if there are too many already."""
        used, room = int(self.block[USED_SHARED]), int(self.block[ROOM_SHARED])
        if used + len(record) > MOST_SHARED:
            return None
        if used + len(record) > room:
            more = max(room, len(record), 1 << 16)
            self.block = np.concatenate([self.block, np.zeros(more, np.int32)])
            self.address = self.block.ctypes.data
            self.block[ROOM_SHARED] = room + more
        start = int(self.block[SHARED]) + used
        self.block[start : start + len(record)] = record
        self.block[USED_SHARED] += len(record)
        self.shared[key] = -2 - used
        return -2 - used

    def spells(self, token: int) -> bytes:
        """Bytes of an id; empty for special ones."""
        if not 0 <= token < len(self.tokens) or token in self.ends:
            return b""
        return self.tokens[token] or b""

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None, ends: Sequence[int] | None = None) -> Vocabulary:
        """Of a fast tokenizer of transformers (or tokenizers). size: width of the model's logits, if it is padded. The
        same tokenizer gives the same object again, with all that is known of its splits."""
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(inner, "to_str"):
            raise BadRequest(
                f"{type(tokenizer).__name__} does not say what its tokens spell; give a fast tokenizer (use_fast=True) "
                "or build Vocabulary(tokens=...) from the bytes of each id"
            )
        if ends is None:
            end = getattr(tokenizer, "eos_token_id", None)
            ends = () if end is None else (int(end),)
        key = (inner.get_vocab_size(with_added_tokens=True), size, tuple(ends))
        try:
            known = KNOWN.setdefault(tokenizer, {})
        except TypeError:  # no weak reference to this kind of object
            known = {}
        if key not in known:
            known[key] = cls._read(inner, size, key[2])
        return known[key]

    @classmethod
    def _read(cls, inner: Any, size: int | None, ends: tuple[int, ...]) -> Vocabulary:
        state = json.loads(inner.to_str())
        table: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        spell = _spelling(state)
        special = {entry["id"] for entry in state.get("added_tokens", ()) if entry.get("special")}
        added = {entry["id"]: entry["content"] for entry in state.get("added_tokens", ()) if not entry.get("special")}
        tokens: list[bytes | None] = [None] * (max(table.values()) + 1)
        for token, number in table.items():
            if number not in special:
                tokens[number] = added[number].encode() if number in added else spell(token)

        def encode(text: str) -> list[int]:
            return list(inner.encode(text, add_special_tokens=False).ids)

        return cls(tokens, ends, max(size or 0, len(tokens)), encode)


def _parts(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A component of a tokenizer and those inside it, flattened."""
    if not state:
        return []
    inner = [*state.get("decoders", ()), *state.get("pretokenizers", ())]
    return [state] + [part for one in inner for part in _parts(one)]


def _spelling(state: dict[str, Any]) -> Callable[[str], bytes | None]:
    """How this tokenizer writes bytes in its tokens: byte-level, or with a sign for the blank and bytes as <0xFF>."""
    parts = _parts(state.get("decoder")) + _parts(state.get("pre_tokenizer"))
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        table = byte_letters()

        def byte_level(token: str) -> bytes | None:
            known = [table.get(letter) for letter in token]
            return token.encode() if None in known else bytes(b for b in known if b is not None)

        return byte_level
    blank = next((part["replacement"] for part in parts if part.get("type") == "Metaspace"), "\u2581")
    fallback = bool((state.get("model") or {}).get("byte_fallback"))

    def plain(token: str) -> bytes | None:
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(blank, " ").encode()

    if "WordPiece" in kinds or (state.get("model") or {}).get("type") == "WordPiece":
        raise BadRequest(
            "a WordPiece tokenizer does not say where blanks are; a grammar needs one whose tokens spell the text "
            "exactly (byte-level BPE, or SentencePiece with byte fallback)"
        )
    return plain


def byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes with."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    table.update({chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in set(shown))})
    return table
