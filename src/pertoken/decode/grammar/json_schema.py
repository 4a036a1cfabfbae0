"""JSON Schema (drafts 2020-12 and 7) as a grammar: the compact texts of exactly the values that match.

`json_schema(schema)` gives a grammar whose sentences are `json.dumps(value, separators=(",", ":"), ensure_ascii=False)`
of matching values. A keyword that cannot be honoured is refused by name (`Unsupported`), never ignored; unknown
keywords too. What the sentences leave out of all matching texts:

- **Order**: members come in the order of `properties` (a schema's own first, then those of `allOf`, `$ref` and so on,
  as they are met), names that are only in `required` after them, and then all other names.
- **Spelling**: an integer has no fraction; numbers with bounds or `multipleOf` have no exponent; strings with a
  pattern, format or enumeration, and names that may not be certain others, are escaped as `json.dumps` does, other
  strings in any way.

`format` is asserted by default, although the specification makes it a note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.ir import Grammar, Ref
from pertoken.decode.grammar.schema_documents import DRAFTS, Documents, Unsupported
from pertoken.decode.grammar.schema_meaning import Meaning
from pertoken.decode.grammar.schema_rules import Rules

__all__ = ["Unsupported", "json_schema"]


def json_schema(
    schema: Any,
    *,
    blanks: bool = False,
    formats: bool = True,
    draft: int = 2020,
    documents: Mapping[str, Any] | None = None,
) -> Grammar:
    """The grammar of a schema: a dict, True or False, or its JSON text.

    blanks: whether blanks and line breaks may stand where JSON allows them (up to 32 in a row); formats: whether
    `format` is asserted; draft: 2020 or 7, where the schema has no `$schema`; documents: other schemas by address, for
    references; none is ever loaded. Raises `Unsupported` for what cannot be honoured, `BadRequest` for what is no
    schema or allows no value.
    """
    if isinstance(schema, (str, bytes)):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the schema is not JSON that can be read: {error}") from error
    if draft not in DRAFTS.values():
        raise BadRequest(f"draft={draft} is not supported; give one of {', '.join(map(str, DRAFTS.values()))}")
    known = Documents(schema, documents or {}, draft)
    rules = Rules(Meaning(known, formats), blanks)
    rules.rules["root"] = Ref(rules.add(known.root))
    return Grammar(rules.rules, plain=True, known=tuple(rules.known))
