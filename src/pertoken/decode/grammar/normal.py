"""Makes the rules of any grammar fit for the engine, without changing the language.

Small rules without references are written out where they are used, so that tokens which cross their borders need no
stack.

Afterwards no rule matches the empty text (a call of one that did can also be passed over), none begins with itself,
and every state leads to the end of its rule. Left recursion goes in one step per group of rules that begin with each
other: the automaton of rule A walks the left spine of its derivations upwards. It starts where any rule of the group
starts with something outside the group; at the end of a rule B it goes on behind any first edge that calls B, in the
rule where that edge is; at the end of A it may stop.
"""

from __future__ import annotations

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.ir import Grammar, references
from pertoken.decode.grammar.nfa import CALL, COUNT, EPSILON, Builder, Edge, Nfa, empty_rules, reached, weight

MOST_EDGES = 2_000_000
MOST_INLINED = 16  # states of a rule without references that is written out where it is used


def normal(grammar: Grammar) -> tuple[Builder, list[Nfa], list[int], bool]:
    """Builder, automaton and rank of every rule, and whether the root matches the empty text.

    Ranks order rules so that one that begins with a call of another comes before it. Raises `BadRequest` if a rule
    that is used can match no text at all.
    """
    empty = empty_rules(grammar.rules)
    builder = Builder(dict(grammar.rules), empty)
    builder.inlined = {
        name
        for name, node in grammar.rules.items()
        if weight(node) <= MOST_INLINED and not any(True for _ in references(node))
    }
    nfas: list[Nfa] = []
    while len(nfas) < len(builder.names):
        nfas.append(builder.build(builder.rules[builder.names[len(nfas)]]).listed())
    spellable = [empty.get(name, False) for name in builder.names]
    nfas = [_not_empty(_skips(nfa, spellable)) for nfa in nfas]
    ends = _endings(builder, nfas)
    _refuse_endless(grammar, builder, ends, spellable)
    nfas = [_trim(builder, nfa, ends) for nfa in nfas]
    firsts = [_first_calls(builder, nfa) for nfa in nfas]
    groups = _groups(firsts)
    for group in groups:
        if len(group) > 1 or group[0] in firsts[group[0]]:
            spines = {rule: _trim(builder, _spine(builder, rule, group, nfas), ends) for rule in group}
            for rule, nfa in spines.items():
                nfas[rule] = nfa
            if sum(len(nfa.edges) for nfa in nfas) > MOST_EDGES:
                raise BadRequest(
                    f"{len(group)} rules begin with each other ({', '.join(builder.names[r] for r in group[:5])}, ...) "
                    "and take too much memory without that; write them as repetitions"
                )
    ranks = [0] * len(nfas)
    for rank, group in enumerate(groups):  # Tarjan yields called groups first
        for rule in group:
            ranks[rule] = len(groups) - rank
    return builder, nfas, ranks, spellable[builder.numbers[grammar.root]]


def _skips(nfa: Nfa, empty: list[bool]) -> Nfa:
    """Adds a way past every call of a rule that matches the empty text."""
    more = [(q, EPSILON, 0, r) for q, kind, rule, r in nfa.edges if kind == CALL and empty[rule]]
    return Nfa(nfa.edges + more, nfa.size)


def _not_empty(nfa: Nfa) -> Nfa:
    """The same without the empty text: a start of its own with what the old one reads first."""
    start = nfa.size
    edges: list[Edge] = [(start if q == 0 else q, kind, x, start if r == 0 else r) for q, kind, x, r in nfa.edges]
    early = reached(((q, r) for q, kind, _, r in edges if kind == EPSILON), [start])
    edges += [(0, kind, x, r) for q, kind, x, r in edges if q in early and kind != EPSILON]
    return Nfa(edges, nfa.size + 1)


def _usable(builder: Builder, edge: Edge, ends: list[bool]) -> bool:
    kind, x = edge[1], edge[2]
    if kind == CALL:
        return ends[x]
    return ends[builder.counted[x].rule] if kind == COUNT else True


def _endings(builder: Builder, nfas: list[Nfa]) -> list[bool]:
    """Which rules match some text (not counting the empty one)."""
    ends = [False] * len(nfas)
    changed = True
    while changed:
        changed = False
        for rule, nfa in enumerate(nfas):
            if not ends[rule]:
                usable = ((e[0], e[3]) for e in nfa.edges if _usable(builder, e, ends))
                ends[rule] = 1 in reached(usable, [0])
                changed |= ends[rule]
    return ends


def _refuse_endless(grammar: Grammar, builder: Builder, ends: list[bool], spellable: list[bool]) -> None:
    used, stack = {grammar.root}, [grammar.root]
    while stack:
        for name in references(grammar.rules[stack.pop()]):
            if name not in used:
                used.add(name)
                stack.append(name)
    for name in grammar.rules:
        number = builder.numbers[name]
        if name in used and not ends[number] and not spellable[number]:
            what = "the grammar is empty: " if name == grammar.root else ""
            raise BadRequest(
                f"{what}rule {name!r} matches no text, because every alternative needs a rule that never ends or a "
                "choice of nothing; give it an alternative that ends"
            )


def _trim(builder: Builder, nfa: Nfa, ends: list[bool]) -> Nfa:
    """Without states that are not reached or do not lead to the end, renumbered."""
    edges = [e for e in nfa.edges if _usable(builder, e, ends)]
    live = reached(((q, r) for q, _, _, r in edges), [0]) & reached(((r, q) for q, _, _, r in edges), [1])
    numbers = {0: 0, 1: 1}
    for state in sorted(live):
        numbers.setdefault(state, len(numbers))
    kept = dict.fromkeys((numbers[q], k, x, numbers[r]) for q, k, x, r in edges if q in live and r in live)
    return Nfa(list(kept), len(numbers))


def _first_calls(builder: Builder, nfa: Nfa) -> set[int]:
    """Rules that this one may begin with."""
    calls = {x for q, kind, x, _ in nfa.edges if q == 0 and kind == CALL}
    return calls | {builder.counted[x].rule for q, kind, x, _ in nfa.edges if q == 0 and kind == COUNT}


def _groups(firsts: list[set[int]]) -> list[list[int]]:
    """Strongly connected groups (Tarjan, without recursion), those called before those that call."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    on: set[int] = set()
    path: list[int] = []
    groups: list[list[int]] = []
    for root in range(len(firsts)):
        if root in index:
            continue
        work = [(root, iter(sorted(firsts[root])))]
        index[root] = low[root] = len(index)
        path.append(root)
        on.add(root)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    path.append(other)
                    on.add(other)
                    work.append((other, iter(sorted(firsts[other]))))
                    break
                if other in on:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    cut = path.index(node)
                    groups.append(path[cut:])
                    on.difference_update(path[cut:])
                    del path[cut:]
    return groups


def _spine(builder: Builder, rule: int, group: list[int], nfas: list[Nfa]) -> Nfa:
    """Automaton of a rule whose left recursion stays in `group`. Repetitions are numbered anew: each has one end."""
    found, base = Nfa(), {}
    renumbered: dict[int, int] = {}
    for member in group:
        base[member] = found.size
        found.size += nfas[member].size
    inside = set(group)
    for member in group:
        at = base[member]
        for q, kind, x, r in nfas[member].edges:
            if kind == COUNT and x not in renumbered:
                renumbered[x] = len(builder.counted)
                builder.counted.append(builder.counted[x])
            x = renumbered[x] if kind == COUNT else x
            if q == 0 and kind == CALL and x in inside:
                found.edges.append((base[x] + 1, EPSILON, 0, at + r))
            elif q == 0:
                found.edges.append((0, kind, x, at + r))
            else:
                found.edges.append((at + q, kind, x, at + r))
    found.edges.append((base[rule] + 1, EPSILON, 0, 1))
    return found
