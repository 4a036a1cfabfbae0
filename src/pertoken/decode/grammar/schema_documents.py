"""JSON Schema documents: which schemas there are, under which addresses, and what a reference points to.

Every schema that is used has a number. Addresses are those of `$id`, `$anchor` and JSON pointers; nothing is ever
loaded from elsewhere: other documents are given by their address.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from pertoken.core.errors import BadRequest

Conj = frozenset[tuple[int, bool]]  # schemas (by number) that a value must match, or must not
TRUE: Conj = frozenset()
FALSE: Conj = frozenset({(0, False)})
MOST_NESTED = 200
DRAFTS = {"https://json-schema.org/draft/2020-12/schema": 2020, "http://json-schema.org/draft-07/schema": 7}
ONE = {"additionalProperties", "items", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames",
       "unevaluatedItems", "unevaluatedProperties"}  # fmt: skip
LIST = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
TABLE = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
GROUPS = {
    "all types": "type enum const allOf anyOf oneOf not if then else $ref $dynamicRef $defs definitions $id $anchor "
    "$dynamicAnchor $schema $vocabulary",
    "strings": "minLength maxLength pattern format",
    "numbers": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    "arrays": "items prefixItems additionalItems minItems maxItems contains minContains maxContains uniqueItems "
    "unevaluatedItems",
    "objects": "properties patternProperties additionalProperties required propertyNames minProperties maxProperties "
    "dependentRequired dependentSchemas dependencies unevaluatedProperties",
    "notes": "title description default examples $comment deprecated readOnly writeOnly contentMediaType "
    "contentEncoding contentSchema",
}
SUPPORTED = "; ".join(f"{group}: {', '.join(words.split())}" for group, words in GROUPS.items())
KNOWN = {word for words in GROUPS.values() for word in words.split()}


class Unsupported(BadRequest):
    """A schema asks for what cannot be honoured. keyword: by which keyword."""

    def __init__(self, keyword: str, path: str, why: str):
        self.keyword = keyword
        super().__init__(f"JSON Schema keyword {keyword!r} at {path or '#'}: {why}. Supported are {SUPPORTED}")


class Documents:
    """The schemas of one call. schemas, bases, paths, drafts: by number; number 0 is the schema that allows all."""

    def __init__(self, root: Any, others: Mapping[str, Any], draft: int):
        self.schemas: list[Any] = [True]
        self.bases, self.paths, self.drafts = [""], [""], [draft]
        self.numbers: dict[int, int] = {}
        self.resources: dict[str, Any] = {}
        self.anchors: dict[tuple[str, str], Any] = {}
        self.dynamic: dict[str, list[Any]] = {}
        self.others = {address.rstrip("#"): other for address, other in others.items()}
        self.draft = draft
        self.add(root, "")
        self.root = self.conj(root)

    def add(self, document: Any, address: str) -> None:
        """Find all schemas of a document."""
        self.resources[address] = document
        self._scan(document, address, "#" if not address else address + "#", self.draft)

    def _scan(self, schema: Any, base: str, path: str, draft: int, depth: int = 0) -> None:
        if not isinstance(schema, dict) or id(schema) in self.numbers:
            return
        if depth > MOST_NESTED:
            raise BadRequest(
                f"schemas are nested more than {MOST_NESTED} deep at ...{path[-60:]}; name the inner ones in $defs and "
                "refer to them with $ref"
            )
        if isinstance(schema.get("$schema"), str):
            draft = self._draft(schema["$schema"], path)
        if isinstance(schema.get("$id"), str) and not (draft == 7 and "$ref" in schema):
            address, fragment = urldefrag(schema["$id"])
            base = urljoin(base, address) if address else base
            if fragment:
                self.anchors[base, fragment] = schema
            else:
                self.resources.setdefault(base, schema)
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(keyword), str):
                self.anchors[base, schema[keyword]] = schema
        if isinstance(schema.get("$dynamicAnchor"), str):
            self.dynamic.setdefault(schema["$dynamicAnchor"], []).append(schema)
        self.enter(schema, base, path, draft)
        for where, inner in inside(schema):
            self._scan(inner, base, f"{path}/{where}", draft, depth + 1)

    def _draft(self, name: str, path: str) -> int:
        known = DRAFTS.get(name.rstrip("#"))
        if known is None:
            raise Unsupported("$schema", path, f"{name!r} is not a dialect known here; known are {', '.join(DRAFTS)}")
        return known

    def enter(self, schema: dict[str, Any], base: str, path: str, draft: int) -> int:
        """Number of a schema."""
        number = self.numbers.get(id(schema))
        if number is None:
            number = self.numbers[id(schema)] = len(self.schemas)
            self.schemas.append(schema)
            self.bases.append(base)
            self.paths.append(path)
            self.drafts.append(draft)
        return number

    def conj(self, schema: Any, near: int = 0, path: str = "") -> Conj:
        """What a schema asks for; one made up on the way belongs to the document of schema `near`."""
        if schema is True:
            return TRUE
        if schema is False:
            return FALSE
        if not isinstance(schema, dict):
            raise BadRequest(
                f"{path or self.paths[near] or '#'}: {schema!r} is no schema; give an object, true or false"
            )
        return frozenset({(self.enter(schema, self.bases[near], path or self.paths[near], self.drafts[near]), True)})

    def resolve(self, number: int, reference: str, keyword: str) -> Conj:
        """What a reference in schema `number` points to."""
        address, fragment = urldefrag(urljoin(self.bases[number], reference) if reference[:1] != "#" else
                                      self.bases[number] + reference)  # fmt: skip
        if address not in self.resources and address in self.others:
            self.add(self.others[address], address)
        if address not in self.resources:
            raise Unsupported(
                keyword,
                self.paths[number],
                f"{reference!r} leads to {address!r}, a document that was not given (nothing is loaded); known are "
                f"{', '.join(map(repr, sorted(self.resources)[:10]))}",
            )
        target = self.resources[address]
        if fragment and not fragment.startswith("/"):
            target = self.anchors.get((address, fragment))
            if target is None:
                raise BadRequest(f"{self.paths[number]}: {reference!r} names an anchor that does not exist")
        near = number
        if isinstance(target, dict):
            near = self.numbers.get(id(target), number)
        path = f"{address}#{fragment}"
        for part in fragment.split("/")[1:] if fragment.startswith("/") else ():
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and key.isdigit() and int(key) < len(target):
                target = target[int(key)]
            elif isinstance(target, dict) and key in target:
                target = target[key]
            else:
                raise BadRequest(f"{self.paths[number]}: {reference!r} leads nowhere, there is no {key!r}")
            if isinstance(target, dict):
                near = self.numbers.get(id(target), near)
        return self.conj(target, near, path)


def inside(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where (as a JSON pointer) schemas stand directly inside a schema, and these."""
    for keyword, value in schema.items():
        if keyword in TABLE and isinstance(value, dict):
            for name, inner in value.items():
                yield f"{keyword}/{name.replace('~', '~0').replace('/', '~1')}", inner
        elif keyword in LIST and isinstance(value, list):
            yield from ((f"{keyword}/{i}", inner) for i, inner in enumerate(value))
        elif keyword in ONE:
            yield keyword, value
