"""A recogniser written from the definition of a grammar: sets of end positions, by fixpoint. Shares no code with the
engine, and takes time without bound."""

from pertoken.decode.grammar.ir import Alt, Graph, Lit, Ref, Repeat, Seq, Set


def ends(node, data, at, table):
    """Where a node that begins at `at` may end, given what is known of the rules so far (`table[name, at]`)."""
    if isinstance(node, Lit):
        return {at + len(node.data)} if data[at : at + len(node.data)] == node.data else set()
    if isinstance(node, Set):
        return {at + 1} if at < len(data) and node.mask >> data[at] & 1 else set()
    if isinstance(node, Ref):
        return table.setdefault((node.name, at), set())
    if isinstance(node, Alt):
        return set().union(*(ends(item, data, at, table) for item in node.items))
    if isinstance(node, Seq):
        here = {at}
        for item in node.items:
            here = set().union(*(ends(item, data, place, table) for place in here))
        return here
    if isinstance(node, Repeat):
        here, seen = {at}, set()
        found = {at} if node.least == 0 else set()
        count = 0
        while here and (node.most is None or count < node.most):
            here = set().union(*(ends(node.item, data, place, table) for place in here))
            count += 1
            if count >= node.least:
                found |= here
                if node.most is None:
                    here -= seen
                    seen |= here
            elif count > node.least + len(data) + 1:
                break
        return found
    assert isinstance(node, Graph)
    reached, stack = {(0, at)}, [(0, at)]
    while stack:
        state, place = stack.pop()
        for here, inner, there in node.edges:
            if here == state:
                for end in ends(inner, data, place, table):
                    if (there, end) not in reached:
                        reached.add((there, end))
                        stack.append((there, end))
    return {place for state, place in reached if state in node.finals}


def accepts(grammar, data):
    """Whether bytes are a sentence."""
    table = {}
    while True:
        before = {key: set(value) for key, value in table.items()}
        table.setdefault((grammar.root, 0), set())
        for name, at in list(table):
            table[name, at] |= ends(grammar.rules[name], data, at, table)
        if before == table:
            return len(data) in table[grammar.root, 0]
