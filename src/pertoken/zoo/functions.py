"""Functions of a corpus as prompts with answers: the signature and docstring, and the body."""

from __future__ import annotations

import ast
import textwrap
import warnings


def functions(texts: list[str], longest: int = 1200) -> list[tuple[str, str]]:
    """(prompt, body) of every function of the texts of at most `longest` characters, methods outdented, in order.

    A text that does not parse is passed over.
    """
    found = []
    for text in texts:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                told = ast.get_docstring(node, clean=False) is not None
                first = node.body[1 if told and len(node.body) > 1 else 0].lineno
                prompt, body = "".join(lines[node.lineno - 1 : first - 1]), "".join(lines[first - 1 : node.end_lineno])
                if prompt and body and len(prompt) + len(body) <= longest:
                    whole = textwrap.dedent(prompt + body)
                    cut = len(textwrap.dedent(prompt)) if whole.startswith(textwrap.dedent(prompt)) else 0
                    if cut:
                        found.append((whole[:cut], whole[cut:]))
    return found
