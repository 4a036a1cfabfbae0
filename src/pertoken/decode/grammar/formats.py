"""Formats of JSON Schema as regular expressions, from the documents that define them. Each matches whole strings.

Dates know the length of months and leap years; leap seconds are allowed at 23:59:60 in any zone written as `Z` or
`+00:00`. Hosts are ASCII and their labels no reserved ones (`xn--` and the like); of hosts with many labels only those
with short ones, so that none is longer than 253 characters.
"""

from __future__ import annotations

_YEAR = r"[0-9]{4}"
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|"
    rf"02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_ZONE = r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = (
    rf"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?{_ZONE}|"
    r"23:59:60(?:\.[0-9]+)?(?:[Zz]|[+-]00:00))"
)
_CLOCK = r"T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAYS = r"(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_LDH = "[A-Za-z0-9-]"


def _label(most: int) -> str:
    """Letters, digits and inner hyphens, but no two hyphens in third and fourth place."""
    letter = "[A-Za-z0-9]"
    long = rf"{_LDH}(?:{letter}{_LDH}|-{letter}){_LDH}{{0,{most - 5}}}{letter}"
    return rf"{letter}(?:{_LDH}?{letter}|{_LDH}{{2}}{letter}|{long})?"


_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_H16 = r"[0-9A-Fa-f]{1,4}"
_LS32 = rf"(?:{_H16}:{_H16}|{_IPV4})"
_IPV6 = "(?:" + "|".join([
    rf"(?:{_H16}:){{6}}{_LS32}",
    rf"::(?:{_H16}:){{5}}{_LS32}",
    *(rf"(?:(?:{_H16}:){{0,{n}}}{_H16})?::(?:{_H16}:){{{4 - n}}}{_LS32}" for n in range(5)),
    rf"(?:(?:{_H16}:){{0,5}}{_H16})?::{_H16}",
    rf"(?:(?:{_H16}:){{0,6}}{_H16})?::",
]) + ")"  # fmt: skip
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_HOST = (
    "(?:" + "|".join(rf"{_label(m)}(?:\.{_label(m)}){{0,{n}}}" for m, n in ((63, 2), (61, 3), (30, 7), (14, 15))) + ")"
)
_QUOTED = r'"(?:[ !#-\[\]-~]|\\[ -~])*"'
_SUB = r"!$&'()*+,;="
_HEXED = r"%[0-9A-Fa-f]{2}"
_INTERNATIONAL = r"\u00A0-\uD7FF\uF900-\uFDCF\uFDF0-\uFFEF" + "".join(
    rf"\u{{{plane:X}0000}}-\u{{{plane:X}FFFD}}" for plane in range(1, 14)
)
_PRIVATE = r"\uE000-\uF8FF\u{F0000}-\u{FFFFD}\u{100000}-\u{10FFFD}"
_POINTER = r"(?:/(?:[^/~]|~[01])*)*"


def _addresses(more: str = "", private: str = "") -> tuple[str, str]:
    """URIs and relative references (RFC 3986), or with more characters IRIs (RFC 3987)."""
    plain = rf"A-Za-z0-9\-._~{more}"
    letter = rf"(?:[{plain}{_SUB}:@]|{_HEXED})"
    address = rf"\[(?:{_IPV6}|[vV][0-9A-Fa-f]+\.[A-Za-z0-9\-._~{_SUB}:]+)\]"
    authority = rf"(?:(?:[{plain}{_SUB}:]|{_HEXED})*@)?(?:{address}|(?:[{plain}{_SUB}]|{_HEXED})*)(?::[0-9]*)?"
    tail = rf"(?:\?(?:{letter}|[/?{private}])*)?(?:#(?:{letter}|[/?])*)?"
    slashed = rf"(?:/{letter}*)*"
    rooted = rf"//{authority}{slashed}|/(?:{letter}+{slashed})?"
    whole = rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{rooted}|{letter}+{slashed}|){tail}"
    first = rf"(?:[{plain}{_SUB}@]|{_HEXED})+"
    return whole, rf"(?:{whole}|(?:{rooted}|{first}{slashed}|){tail})"


_URI, _URI_REFERENCE = _addresses()
_IRI, _IRI_REFERENCE = _addresses(_INTERNATIONAL, _PRIVATE)
_VARIABLE = rf"(?:[A-Za-z0-9_]|{_HEXED})(?:\.?(?:[A-Za-z0-9_]|{_HEXED}))*(?::[1-9][0-9]{{0,3}}|\*)?"
_TEMPLATE = (
    rf"(?:[!#$&-;=?-\[\]_a-z~{_INTERNATIONAL}{_PRIVATE}]|{_HEXED}|"
    rf"\{{[+#./;?&=,!@|]?{_VARIABLE}(?:,{_VARIABLE})*\}})*"
)

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}[Tt]{_TIME}",
    "duration": rf"P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|[0-9]+W)",
    "email": rf"(?:{_ATOM}(?:\.{_ATOM})*|{_QUOTED})@(?:{_HOST}|\[{_IPV4}\]|\[IPv6:{_IPV6}\])",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uri": _URI,
    "uri-reference": _URI_REFERENCE,
    "iri": _IRI,
    "iri-reference": _IRI_REFERENCE,
    "uri-template": _TEMPLATE,
    "uuid": r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
}
