"""A vocabulary as bytes: what each token id spells, as a sorted trie in flat arrays.

The trie lies in depth-first order: node i has a byte, a depth (1 for first bytes), the number of the node after its
subtree, and the token that ends there. Ids that spell nothing (special tokens, padding of the model's head) are never
allowed by a grammar; the ids that end a text are allowed where a sentence may end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest

MOST_BYTES = 4096


@dataclass(eq=False)
class Vocabulary:
    """tokens: what each id spells (None or empty: nothing); ends: ids that end a text; size: of the model's head, at
    least as many as tokens; encode: text -> ids in the tokenizer's own (canonical) way, for forced text.

    shared: masks that several grammars have in common, see `engine`.
    """

    tokens: Sequence[bytes | None]
    ends: tuple[int, ...] = ()
    size: int = 0
    encode: Callable[[str], list[int]] | None = None
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.size = self.size or len(self.tokens)
        if self.size < len(self.tokens):
            raise BadRequest(
                f"size={self.size} is less than the {len(self.tokens)} tokens given; give the width of the logits"
            )
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
        self._lay_out(spelled)

    def _lay_out(self, spelled: list[tuple[bytes, int]]) -> None:
        """The trie; for each id the next one with the same bytes, or -1; where each id's bytes begin; all bytes."""
        from pertoken.decode.grammar.masks import build_trie

        data = b"".join(b for b, _ in spelled)
        lengths = np.fromiter((len(b) for b, _ in spelled), np.int32, len(spelled))
        ids = np.fromiter((i for _, i in spelled), np.int32, len(spelled))
        flat = np.frombuffer(data, np.uint8)
        nodes = np.zeros((3, len(flat)), np.int32)
        same = np.full(self.size, -1, np.int32)
        count = build_trie(flat, lengths, ids, nodes, same)
        start = np.zeros(self.size + 1, np.int32)
        start[ids + 1] = lengths
        start = np.cumsum(start, dtype=np.int32)
        text = np.frombuffer(b"".join((self.tokens[i] or b"") for i in sorted(ids.tolist())), np.uint8)
        sizes = [count, count, count, self.size, self.size + 1, len(text)]
        offsets = np.cumsum([8, *sizes[:-1]]).tolist()
        parts = [nodes[0, :count], nodes[1, :count], nodes[2, :count], same, start, text]
        self.block = np.zeros(8 + sum(sizes), np.int32)
        self.block[:6], self.block[6], self.block[7] = offsets, count, self.size
        for offset, part in zip(offsets, parts, strict=True):
            self.block[offset : offset + len(part)] = part

    def spells(self, token: int) -> bytes:
        """Bytes of an id; empty for special ones."""
        if not 0 <= token < len(self.tokens) or token in self.ends:
            return b""
        return self.tokens[token] or b""

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None, ends: Sequence[int] | None = None) -> Vocabulary:
        """Of a fast tokenizer of transformers (or tokenizers). size: width of the model's logits, if it is padded."""
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(inner, "to_str"):
            raise BadRequest(
                f"{type(tokenizer).__name__} does not say what its tokens spell; give a fast tokenizer (use_fast=True) "
                "or build Vocabulary(tokens=...) from the bytes of each id"
            )
        state = json.loads(inner.to_str())
        table: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        spell = _spelling(state)
        special = {entry["id"] for entry in state.get("added_tokens", ()) if entry.get("special")}
        added = {entry["id"]: entry["content"] for entry in state.get("added_tokens", ()) if not entry.get("special")}
        tokens: list[bytes | None] = [None] * (max(table.values()) + 1)
        for token, number in table.items():
            if number not in special:
                tokens[number] = added[number].encode() if number in added else spell(token)
        if ends is None:
            end = getattr(tokenizer, "eos_token_id", None)
            ends = () if end is None else (int(end),)

        def encode(text: str) -> list[int]:
            return list(inner.encode(text, add_special_tokens=False).ids)

        return cls(tokens, tuple(ends), max(size or 0, len(tokens)), encode)


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
