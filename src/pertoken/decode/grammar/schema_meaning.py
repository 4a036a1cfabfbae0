"""What schemas mean: `Meaning.of` gives the set of values that match schemas, or do not.

Keywords are taken together by intersection, and their negations by union, so that `not`, `oneOf`, `if` and
`dependentSchemas` follow from the same functions read with the other sign. Schemas at the same place (`$ref`, `allOf`,
...) are worked out at once, those of inner values only named. `unevaluated...` looks at which items and members the
shapes have `seen`; where it does, the alternatives of `anyOf` are taken in every combination.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.schema_applicators import APPLICATORS, opposite
from pertoken.decode.grammar.schema_documents import KNOWN, TRUE, Conj, Documents, Unsupported
from pertoken.decode.grammar.schema_keywords import PLAIN
from pertoken.decode.grammar.schema_logic import LOGIC
from pertoken.decode.grammar.schema_shapes import EVERY, EVERY_NAME
from pertoken.decode.grammar.schema_values import ANYTHING, NOTHING, Values, any_of, barred


class Meaning:
    """formats: whether `format` is asserted (else it is a note, as the specification has it)."""

    def __init__(self, documents: Documents, formats: bool):
        self.documents, self.formats = documents, formats
        self.known: dict[tuple[int, bool, bool], Values] = {}
        self.sets: dict[tuple[Conj, bool], Values] = {}
        self.working: list[tuple[int, bool, bool]] = []
        self.made: dict[int, Any] = {}

    def of(self, conj: Conj, track: bool = False) -> Values:
        """Values that match all schemas of `conj`."""
        found = self.sets.get((conj, track))
        if found is None:
            found = NOTHING if barred(conj) else ANYTHING
            for number, sign in sorted(conj) if found is ANYTHING else ():
                found = found.meet(self.schema(number, sign, track))
            self.sets[conj, track] = found
        return found

    def signed(self, schema: Any, near: int, sign: bool, track: bool = False) -> Values:
        """Values that match a schema, or do not."""
        conj = self.documents.conj(schema, near)
        return self.of(conj, track) if sign else self.of(opposite(conj), track)

    def empty(self, conj: Conj, depth: int = 3) -> bool:
        """Whether schemas provably allow nothing; looks only so deep into values."""
        return barred(conj) or self.void(self.of(conj), depth)

    def schema(self, number: int, sign: bool, track: bool) -> Values:
        """Values that match a schema, given by its number, or do not."""
        key = (number, sign, track)
        if key not in self.known:
            if key in self.working:
                raise BadRequest(
                    f"the schema at {self.documents.paths[number] or '#'} refers to itself without going into a value, "
                    "so that it says nothing; remove that reference"
                )
            self.working.append(key)
            self.known[key] = self._simple(number, sign) or self._keywords(number, sign, track)
            self.working.pop()
        return self.known[key]

    def _simple(self, number: int, sign: bool) -> Values | None:
        """What a schema says that has only keywords about values themselves; kept for other schemas that say the
        same."""
        schema = self.documents.schemas[number]
        if not isinstance(schema, dict) or not schema or not schema.keys() <= PLAIN.keys():
            return None
        said = [(keyword, tuple(x) if isinstance(x, list) else x, type(x)) for keyword, x in schema.items()]
        key = (tuple(said), sign, self.formats)
        try:
            found = SIMPLE.get(key)
        except TypeError:  # no keyword has such an argument
            return None
        if found is None:
            found = self._keywords(number, sign, False)
            if len(SIMPLE) >= MOST_SIMPLE:
                SIMPLE.clear()
            SIMPLE[key] = found
        return found

    def _keywords(self, number: int, sign: bool, track: bool) -> Values:
        if number == 0:
            return ANYTHING if sign else NOTHING
        schema = self.documents.schemas[number]
        old = self.documents.drafts[number] == 7
        if old and "$ref" in schema:
            schema = {"$ref": schema["$ref"]}
        if not KNOWN.issuperset(schema):
            keyword = next(keyword for keyword in schema if keyword not in KNOWN)
            raise Unsupported(keyword, self.documents.paths[number], "it is not known here")
        late = [keyword for keyword in ("unevaluatedItems", "unevaluatedProperties") if keyword in schema and not old]
        sees = sign and (track or bool(late))
        found: list[Values] = []
        for keyword, argument in sorted(schema.items(), key=lambda entry: entry[0] != "properties"):
            where = f"{self.documents.paths[number] or '#'}/{keyword}"
            if keyword in PLAIN:
                if keyword != "format" or self.formats:
                    found.append(PLAIN[keyword](argument, where, sign))
            elif keyword in INSIDE:
                if keyword in (NEWER if old else OLDER):
                    raise Unsupported(keyword, self.documents.paths[number], "another draft has this keyword")
                found.append(INSIDE[keyword](self, number, schema, sign, sees))
        if not sign:
            if late:
                raise Unsupported(late[0], self.documents.paths[number], "it cannot be negated")
            return any_of(found)
        whole = ANYTHING
        for values in found:
            whole = whole.meet(values)
        if late:
            whole = self._unevaluated(number, schema, whole, late)
        return whole if track else whole.plain()

    def _unevaluated(self, number: int, schema: dict[str, Any], values: Values, late: list[str]) -> Values:
        """`values` with the items and members that no keyword of this schema has seen held to a schema."""
        if "unevaluatedItems" in late:
            rest = self.documents.conj(schema["unevaluatedItems"], number)
            arrays = []
            for shape in values.arrays:
                if shape.contains and shape.seen < EVERY and rest != TRUE:
                    raise Unsupported("unevaluatedItems", self.documents.paths[number], "not beside contains")
                size = max(len(shape.prefix), min(shape.seen, EVERY - 1) if shape.seen < EVERY else 0)
                prefix = tuple(shape.at(i) | (rest if i >= shape.seen else TRUE) for i in range(size))
                after = shape.rest | (rest if shape.seen < EVERY else TRUE)
                arrays.append(replace(shape, prefix=prefix, rest=after, seen=EVERY))
            values = replace(values, arrays=tuple(arrays))
        if "unevaluatedProperties" in late:
            rest = self.documents.conj(schema["unevaluatedProperties"], number)
            objects = []
            for shape in values.objects:
                left = EVERY_NAME
                for seen in shape.seen:
                    left = left.without(seen)
                objects.append(replace(shape, rules=(*shape.rules, (left, rest)), seen=(EVERY_NAME,)))
            values = replace(values, objects=tuple(objects))
        return values

    def void(self, values: Values, depth: int) -> bool:
        """Whether a set of values is provably empty."""
        if values.null or values.booleans or not values.numbers.empty:
            return False
        if not all(text.empty for text in values.strings):
            return False
        if depth == 0:
            return not values.arrays and not values.objects
        for items in values.arrays:
            if not any(self.empty(items.at(i), depth - 1) for i in range(min(items.least, len(items.prefix) + 1))):
                return False
        for members in values.objects:
            if not any(self.empty(members.of(name), depth - 1) for name in members.order if name in members.required):
                return False
        return True


NEWER = {"prefixItems", "dependentRequired", "dependentSchemas", "$dynamicRef", "minContains", "maxContains"}
OLDER = {"additionalItems"}
INSIDE = LOGIC | APPLICATORS
MOST_SIMPLE = 4096
SIMPLE: dict[tuple[Any, ...], Values] = {}
