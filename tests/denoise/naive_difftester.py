"""DiffTester's decision as loops over lines, leaves and tokens: too slow to use, too simple to be wrong.

A cluster's template is not built here. That a leaf belongs to it is asked of all its lines together: the leaf is there
in every line, and on the way to it from the root, at every level, everything up to it is of the same kind in every
line and is neither an error nor protected on the way itself.
"""

from __future__ import annotations

ERROR = "ERROR"


def leaves(tree, path=()):
    """(path, leaf) of every leaf that has a text."""
    if not tree.children:
        return [(path, tree)] if tree.text else []
    return [found for i, child in enumerate(tree.children) for found in leaves(child, (*path, i))]


def at(tree, path):
    for step in path:
        if step >= len(tree.children):
            return None
        tree = tree.children[step]
    return tree


def common(trees, path, protected):
    """Whether the leaf at this path belongs to what all trees have in common."""
    if any(tree.kind == ERROR or tree.kind != trees[0].kind for tree in trees):
        return False
    for depth in range(len(path)):
        for sibling in range(path[depth] + 1):
            nodes = [at(tree, (*path[:depth], sibling)) for tree in trees]
            if any(node is None or node.kind == ERROR or node.kind != nodes[0].kind for node in nodes):
                return False
    for depth in range(len(path) + 1):
        if at(trees[0], path[:depth]).kind in protected:
            return False
    found = [at(tree, path) for tree in trees]
    if any(leaf.children or not leaf.text for leaf in found):
        return False
    return not found[0].kind.endswith("identifier") or len({leaf.text for leaf in found}) == 1


def spans(trees, protected):
    """For each tree the (start, end) bytes that it shares with its cluster; a line joins the first cluster that still
    has something in common with it."""
    clusters = []
    for number, tree in enumerate(trees):
        for cluster in clusters:
            together = [trees[member] for member in cluster] + [tree]
            if any(common(together, path, protected) for path, _ in leaves(tree)):
                cluster.append(number)
                break
        else:
            clusters.append([number])
    found = [[] for _ in trees]
    for cluster in clusters:
        if len(cluster) > 1:
            for member in cluster:
                together = [trees[m] for m in cluster]
                for path, leaf in leaves(trees[member]):
                    if common(together, path, protected):
                        found[member].append((leaf.start, leaf.end))
    return found


def approved(rows, pieces, special, start, parse, protected, useless):
    """For each row the places of approved tokens.

    rows: lists of (token, undecided) in order, the prompt first; start: where the canvas begins. Rows of one group.
    """
    lines = []
    for number, row in enumerate(rows):
        line, begun = [], b""
        for place, (token, undecided) in enumerate(row):
            if place >= start and token in special:
                break
            for byte in pieces[token]:
                line.append((place, undecided))
                begun += bytes([byte])
                if byte == 10:
                    lines.append((number, begun, line))
                    line, begun = [], b""
        if begun:
            lines.append((number, begun, line))
    open_lines = [(n, text, places) for n, text, places in lines if any(u for _, u in places) and not useless(text)]
    shared = iter(spans([parse(text) for _, text, _ in open_lines], protected))
    marked = {}
    for line in lines:
        number, text, places = line
        found = next(shared) if line in open_lines else []
        for byte in range(len(text)):
            inside = any(first <= byte < last for first, last in found)
            marked.setdefault((number, places[byte][0]), []).append((inside, text[byte : byte + 1].isspace()))
    result = [set() for _ in rows]
    for number, row in enumerate(rows):
        for place, (token, undecided) in enumerate(row):
            flags = marked.get((number, place), [])
            whole = len(flags) == len(pieces[token]) > 0
            if undecided and whole and all(a or b for a, b in flags) and not all(b for _, b in flags):
                result[number].add(place)
    return result
