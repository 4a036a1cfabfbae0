"""The bytes of every token, so that the places of tokens in a text are exact.

Decoding token by token is lossy: a token of a byte-level vocabulary may be part of a character, and some tokenizers
drop a blank at the start. With the bytes the whole text is a concatenation, and offsets are a cumulative sum.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest

_KEPT: weakref.WeakKeyDictionary[Any, Pieces] = weakref.WeakKeyDictionary()
_PROBE = "é\n a"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Pieces:
    """buffer `[byte]` uint8: all pieces one after the other; starts, lengths `[token]`; special `[token]`: such as the
    end of text. The last entry, which is empty, stands for ids that the tokenizer does not know."""

    buffer: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    special: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any) -> Pieces:
        """Those of a transformers tokenizer, worked out once; raises `BadRequest` for anything else."""
        if not all(callable(getattr(tokenizer, name, None)) for name in ("convert_ids_to_tokens", "decode", "encode")):
            raise BadRequest(
                f"tokenizer={type(tokenizer).__name__} cannot spell tokens; give the model's transformers tokenizer, "
                "such as AutoTokenizer.from_pretrained(...)"
            )
        kept = _KEPT.get(tokenizer)
        if kept is None or len(kept.lengths) != len(tokenizer) + 1:
            kept = _KEPT[tokenizer] = cls._made(tokenizer)
        return kept

    @classmethod
    def _made(cls, tokenizer: Any) -> Pieces:
        pieces, special = _spelled(tokenizer), np.zeros(len(tokenizer) + 1, bool)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ends = {*tokenizer.all_special_ids, *(token for token, about in added.items() if about.special)}
        special[[token for token in ends if token < len(tokenizer)]] = True
        lengths = np.array([*map(len, pieces), 0])
        return cls(np.frombuffer(b"".join(pieces), np.uint8), np.cumsum(lengths) - lengths, lengths, special)

    def known(self, ids: np.ndarray) -> np.ndarray:
        """The ids, those that have no piece replaced by that of the empty one."""
        return np.where((ids >= 0) & (ids < len(self.lengths)), ids, len(self.lengths) - 1)

    def text(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes `[byte]` of ids `[token]`, and where each token ends in them `[token]`."""
        ids = self.known(ids)
        lengths = self.lengths[ids]
        ends = lengths.cumsum()
        index = np.arange(lengths.sum()) + np.repeat(self.starts[ids] - ends + lengths, lengths)
        return self.buffer[index], ends


def _spelled(tokenizer: Any) -> list[bytes]:
    """The bytes of every token: by the byte alphabet where that spells a probe, else as decoded behind an anchor."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    probe = tokenizer.convert_ids_to_tokens(tokenizer.encode(_PROBE, add_special_tokens=False))
    if _bytes("".join(probe)) == _PROBE.encode():
        added = {about.content for about in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        return [t.encode() if t in added else _bytes(t) or b"" for t in (token or "" for token in tokens)]
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    before = tokenizer.decode([anchor])
    decoded = tokenizer.batch_decode([[anchor, token] for token in range(len(tokens))])
    pieces = []
    for token, text in zip(tokens, decoded, strict=True):
        byte = _BYTE.fullmatch(token or "")
        pieces.append(bytes([int(byte[1], 16)]) if byte else text.removeprefix(before).encode())
    return pieces


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others for 256 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _bytes(token: str) -> bytes | None:
    found = [_alphabet().get(character) for character in token]
    return None if None in found else bytes(found)  # type: ignore[arg-type]
