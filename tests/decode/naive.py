"""Naive twins of the speculative-decoding methods: slow, loop by loop, float64, read straight off the papers' digests.

Nothing here is meant to be fast. Each function follows one numbered section of a digest, so that a fast implementation
can be compared with it on small inputs.

* DySpec, arXiv 2410.11744: sections A (greedy construction), B (threshold construction), C (verification), D (mask).
* DEL, arXiv 2504.05598: algorithm steps 4 (acceptance of a chain) and 5 to 8 (statistics and selection).

Conventions: a *path* is the tuple of tokens from below the root to a node, so the root's path is ``()``. A tree is a
list of :class:`Node` in the order the nodes were drawn; siblings were therefore drawn in increasing index order, which
is the order verification must try them in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ROOT = -1

Path = tuple[int, ...]
Law = Callable[[Path], np.ndarray]
Choose = Callable[[np.ndarray, Path], int]
Uniform = Callable[[], float]


@dataclass(frozen=True)
class Node:
    """One drawn token.

    ``value`` is the node's expected contribution to the accepted length (DySpec, A.4: ``v0 = v * R[y]``), the estimated
    probability that it is accepted. ``reach`` is the value ``v`` its place had when it was drawn (A.2), the estimated
    probability that verification gets as far as trying it; it is known before the draw and orders the heap.
    """

    token: int
    parent: int  # index into the tree, ROOT for a child of the prefix
    value: float
    reach: float


Tree = list[Node]


# ------------------------------------------------------------------------------------------------ small helpers


def normalise(weights: np.ndarray) -> np.ndarray | None:
    """The law proportional to ``weights`` in float64, or None when there is no mass at all."""
    weights = np.array(weights, dtype=np.float64)  # a copy: callers change it in place
    total = weights.sum()
    if not total > 0.0:
        return None
    return weights / total


def law_at(law: Law, path: Path) -> np.ndarray:
    """``law(path)`` as a fresh, exactly renormalised float64 array; a law without mass is an error of the caller."""
    probabilities = normalise(law(path))
    if probabilities is None:
        raise ValueError(f"the law at {path} has no mass")
    return probabilities


def without(residual: np.ndarray, token: int) -> np.ndarray | None:
    """``R[y] <- 0; renormalise`` (DySpec, A.3 and B.2); None when nothing is left to draw."""
    residual = residual.copy()
    residual[token] = 0.0
    return normalise(residual)


def inverse_cdf(probabilities: np.ndarray, u: float) -> int:
    """Smallest token whose cumulated probability exceeds ``u``; never a token of probability zero."""
    cumulated = 0.0
    last = -1
    total = float(sum(probabilities.tolist()))
    for token, probability in enumerate(probabilities.tolist()):
        if probability > 0.0:
            cumulated += probability
            last = token
            if cumulated > u * total:
                return token
    if last < 0:
        raise ValueError("cannot sample from a law without mass")
    return last  # u rounded up to the whole mass


def path_of(tree: Tree, index: int) -> Path:
    """Tokens from below the root down to node ``index``, by walking parents."""
    tokens: list[int] = []
    while index != ROOT:
        tokens.append(tree[index].token)
        index = tree[index].parent
    return tuple(reversed(tokens))


def children_of(tree: Tree, index: int) -> list[int]:
    """Children of node ``index`` in the order they were drawn."""
    return [child for child, node in enumerate(tree) if node.parent == index]


def _draw(choose: Choose, residual: np.ndarray, place: Path) -> int:
    token = int(choose(residual.copy(), place))
    if not residual[token] > 0.0:
        raise ValueError(f"the chooser returned token {token}, which has no mass at place {place}")
    return token


# ------------------------------------------------------------------------------------------------ DySpec: growing


def grow_greedy(draft: Law, size: int, choose: Choose) -> Tree:
    """DySpec, section A: greedy construction with a fixed size.

    Open places are kept in a plain list and the best one is found by scanning. Ties go to the place that was inserted
    first (pitfall "use an insertion counter"); within one step the sibling place is inserted before the child place
    (A.3 before A.4). ``size`` counts drawn nodes, not the root. ``choose`` draws y from the residual (A.2); with
    anything but a draw from it the output law of :func:`verify` is no longer the target's.
    """
    tree: Tree = []
    # A.1: one place, the root's, with value 1. Entries: (value, insertion counter, parent, residual).
    places: list[tuple[float, int, int, np.ndarray]] = [(1.0, 0, ROOT, law_at(draft, ()))]
    inserted = 1
    while len(tree) < size and places:
        best = 0
        for i in range(1, len(places)):  # the list is in insertion order, so a strict comparison keeps the first
            if places[i][0] > places[best][0]:
                best = i
        v, _, parent, residual = places.pop(best)
        place = path_of(tree, parent)

        y = _draw(choose, residual, place)
        probability = float(residual[y])
        tree.append(Node(token=y, parent=parent, value=v * probability, reach=v))

        rest = without(residual, y)
        if rest is not None:  # A.3
            places.append((v * max(0.0, 1.0 - probability), inserted, parent, rest))
            inserted += 1
        # A.4
        places.append((v * probability, inserted, len(tree) - 1, law_at(draft, (*place, y))))
        inserted += 1
    return tree


def grow_threshold(draft: Law, threshold: float, cap: int, choose: Choose, known: bool = False) -> Tree:
    """DySpec, section B: layer by layer, drawing at a place while its value is at least ``threshold``.

    The printed ``while v < t`` is an error of the paper; this loops while ``v >= t``. The frontier is worked through
    in the order its nodes were drawn, and growth stops at once, also in the middle of a layer, at ``cap`` nodes.
    ``known``: the most likely token will be drawn, so that its own probability belongs to the value of the draw.
    """

    def worth(v: float, residual: np.ndarray) -> bool:
        return v * (float(residual.max()) if known else 1.0) >= threshold

    tree: Tree = []
    frontier: list[tuple[int, float]] = [(ROOT, 1.0)]  # B.1
    while frontier:
        next_frontier: list[tuple[int, float]] = []
        for parent, value in frontier:
            place = path_of(tree, parent)
            v = value
            residual = law_at(draft, place) if v >= threshold else None
            while residual is not None and worth(v, residual):  # B.2
                if len(tree) >= cap:
                    return tree
                y = _draw(choose, residual, place)
                probability = float(residual[y])
                tree.append(Node(token=y, parent=parent, value=v * probability, reach=v))
                next_frontier.append((len(tree) - 1, v * probability))
                v = v * max(0.0, 1.0 - probability)
                residual = without(residual, y)
        frontier = next_frontier  # B.3
    return tree


# ------------------------------------------------------------------------------------------------ DySpec: estimates


def expected_length(tree: Tree) -> float:
    """Estimated number of accepted draft tokens: the sum of the node values (the token added by the target is not
    counted)."""
    return float(sum(node.value for node in tree))


def expected_length_brute(draft: Law, tree: Tree) -> float:
    """The same estimate from the product formula of DySpec's "Algorithm" paragraph,

    ``sum_u prod_i SD[a_i] * prod_j (1 - SD[s_j]) * SD[u]``,

    with SD[x] the draft probability of x renormalised over what its earlier siblings left. For the product to be the
    probability that the walk reaches and accepts u, the factors ``1 - SD[s]`` run over the earlier siblings of u *and*
    of each of its ancestors.
    """
    total = 0.0
    for index in range(len(tree)):
        product = 1.0
        x = index
        while x != ROOT:
            parent = tree[x].parent
            d = law_at(draft, path_of(tree, parent))
            for sibling in children_of(tree, parent):
                if sibling == x:
                    product *= float(d[tree[x].token])
                    break
                product *= 1.0 - float(d[tree[sibling].token])
                d[tree[sibling].token] = 0.0
                left = d.sum()
                if left > 0.0:
                    d = d / left
            x = parent
        total += product
    return total


# ------------------------------------------------------------------------------------------------ DySpec: verifying


def verify(tree: Tree, draft: Law, target: Law, uniform: Uniform) -> tuple[list[int], int]:
    """DySpec, section C: multi-draft rejection along the tree. Returns (accepted node indices, final token).

    The printed ``c ~ N(0, 1)`` is an error of the paper; c is uniform on (0, 1). One uniform is used for each child
    tried, in order, and one more for the final token, which is drawn by :func:`inverse_cdf` from the residual target
    law, or from the target's own law at a leaf.

    Borderline cases: a child of target mass zero is never accepted, also when c is exactly 0. If ``max(R - d, 0)`` has
    no mass then R equals d and a rejection had probability zero (rounding only): R is kept and no further child is
    tried. If d has no mass left, no further child is tried.
    """
    accepted: list[int] = []
    current = ROOT
    while True:
        path = path_of(tree, current)
        R = law_at(target, path)
        children = children_of(tree, current)
        moved = False
        d = law_at(draft, path) if children else None
        for child in children:
            if d is None:
                break  # d exhausted, or R equal to d: stop trying children
            y = tree[child].token
            if not d[y] > 0.0:
                raise ValueError(f"node {child} holds token {y}, which could not have been drawn at {path}")
            c = uniform()
            if R[y] > 0.0 and c <= R[y] / d[y]:
                accepted.append(child)
                current = child
                moved = True
                break
            residual = normalise(np.maximum(R - d, 0.0))
            if residual is None:
                d = None
            else:
                R = residual
                d = without(d, y)
        if not moved:
            return accepted, inverse_cdf(R, uniform())


def verify_greedy(tree: Tree, target: Law) -> tuple[list[int], int]:
    """Section C at target temperature 0 (pitfall "T = 0 target"): follow the target's argmax while the tree has it.

    Equal target probabilities go to the smallest token.
    """
    accepted: list[int] = []
    current = ROOT
    while True:
        best = int(np.argmax(np.asarray(target(path_of(tree, current)), dtype=np.float64)))
        match = [child for child in children_of(tree, current) if tree[child].token == best]
        if not match:
            return accepted, best
        current = match[0]
        accepted.append(current)


def tree_mask(parents: Sequence[int]) -> np.ndarray:
    """DySpec, section D: ``mask[i, j]`` is True iff j is i or an ancestor of i.

    ``parents[k]`` is the parent of node k (-1: the root). Row and column 0 are the root, node k is at k + 1.
    """
    n = len(parents)
    mask = np.zeros((n + 1, n + 1), dtype=bool)
    mask[0, 0] = True
    for k in range(n):
        walk = k
        steps = 0
        while walk != ROOT:
            mask[k + 1, walk + 1] = True
            walk = parents[walk]
            steps += 1
            if steps > n:
                raise ValueError("the parents contain a cycle")
        mask[k + 1, 0] = True
    return mask


# ------------------------------------------------------------------------------------------------ chains


def rejection_chain(
    draft_probs: Sequence[np.ndarray],
    target_probs: Sequence[np.ndarray],
    tokens: Sequence[int],
    uniform: Uniform,
) -> tuple[int, int]:
    """Ordinary speculative sampling of a chain (DEL, step 4, sampling). Returns (tokens accepted, final token).

    Token i was drawn from ``draft_probs[i]`` = q; it is accepted with probability min(1, p/q), p =
    ``target_probs[i]``. The first rejection draws the final token from max(p - q, 0), renormalised; if everything is
    accepted it is drawn from ``target_probs[len(tokens)]``. One uniform per token tried, one more for the final token.
    """
    if len(draft_probs) < len(tokens) or len(target_probs) < len(tokens) + 1:
        raise ValueError("a chain of n tokens needs n draft laws and n + 1 target laws")
    for i, token in enumerate(tokens):
        q = law_at(lambda _, i=i: draft_probs[i], ())
        p = law_at(lambda _, i=i: target_probs[i], ())
        if not q[token] > 0.0:
            raise ValueError(f"token {token} at position {i} could not have been drawn")
        u = uniform()
        if p[token] > 0.0 and u <= p[token] / q[token]:
            continue
        residual = normalise(np.maximum(p - q, 0.0))
        if residual is None:  # p equals q: only rounding gets here
            residual = p
        return i, inverse_cdf(residual, uniform())
    bonus = law_at(lambda _: target_probs[len(tokens)], ())
    return len(tokens), inverse_cdf(bonus, uniform())


# ------------------------------------------------------------------------------------------------ DEL


class DelController:
    """DEL, algorithm steps 5 to 8: which exit layer and how many drafts next, from shadow tokens.

    Layers are counted as the number of layers run, so the eligible exits are 1 to ``layers - 1``; row ``E - 1`` of the
    shadow inputs belongs to exit E. Draft lengths run over 0 to ``gamma_max``, both included (the release scores one
    fewer). An exit never seen has alpha 0.5; an exit without a match or without a mismatch has tau 0, so that
    ``conf < tau`` never stops it (the release divides 0 by 0 in both places). A selected length of 0 means no draft.
    """

    def __init__(self, layers: int, gamma_max: int = 18, omega: float = 0.95) -> None:
        if layers < 2:
            raise ValueError("an early exit needs at least two layers")
        self.layers = layers
        self.gamma_max = gamma_max
        self.omega = omega
        exits = layers - 1
        self.match = [0.0] * exits  # M[l].match
        self.mismatch = [0.0] * exits  # M[l].mismatch
        self.conf_match = [0.0] * exits  # S[l].match
        self.conf_mismatch = [0.0] * exits  # S[l].mismatch

    def _row(self, exit_layer: int) -> int:
        if not 1 <= exit_layer <= self.layers - 1:
            raise ValueError(f"exit {exit_layer} is not among 1..{self.layers - 1}")
        return exit_layer - 1

    def update(
        self,
        exit_layer: int,
        shadow_tokens: Sequence[Sequence[int]],
        shadow_conf: Sequence[Sequence[float]],
        target_tokens: Sequence[int],
        clip: bool,
    ) -> int:
        """Steps 5 (matches), 6 (clip), 7 (decayed sums). Returns the number of columns counted.

        With ``clip``, the columns after the first one where ``exit_layer`` disagrees with the target are dropped, that
        one is kept, and all exits are cut at the same column.
        """
        row = self._row(exit_layer)
        columns = len(target_tokens)
        if len(shadow_tokens) != self.layers - 1 or len(shadow_conf) != self.layers - 1:
            raise ValueError(f"expected {self.layers - 1} shadow rows")
        for tokens, conf in zip(shadow_tokens, shadow_conf, strict=True):
            if len(tokens) != columns or len(conf) != columns:
                raise ValueError(f"expected {columns} columns in every shadow row")

        keep = columns
        if clip:
            for i in range(columns):
                if shadow_tokens[row][i] != target_tokens[i]:
                    keep = i + 1
                    break

        for r in range(self.layers - 1):
            matches = 0.0
            mismatches = 0.0
            on_match = 0.0
            on_mismatch = 0.0
            for i in range(keep):
                if shadow_tokens[r][i] == target_tokens[i]:
                    matches += 1.0
                    on_match += float(shadow_conf[r][i])
                else:
                    mismatches += 1.0
                    on_mismatch += float(shadow_conf[r][i])
            self.match[r] = self.omega * self.match[r] + matches
            self.mismatch[r] = self.omega * self.mismatch[r] + mismatches
            self.conf_match[r] = self.omega * self.conf_match[r] + on_match
            self.conf_mismatch[r] = self.omega * self.conf_mismatch[r] + on_mismatch
        return keep

    def alpha(self, exit_layer: int) -> float:
        """Step 8: estimated acceptance rate at an exit; 0.5 when nothing was counted."""
        r = self._row(exit_layer)
        counted = self.match[r] + self.mismatch[r]
        if counted == 0.0:
            return 0.5
        return self.match[r] / counted

    def tau(self, exit_layer: int) -> float:
        """Step 2: the confidence below which drafting stops; 0 until the exit has both a match and a mismatch."""
        r = self._row(exit_layer)
        if self.match[r] == 0.0 or self.mismatch[r] == 0.0:
            return 0.0
        return 0.5 * (self.conf_match[r] / self.match[r] + self.conf_mismatch[r] / self.mismatch[r])

    def tpl(self, exit_layer: int, drafts: int) -> float:
        """Step 8: tokens per layer, ``(1 + alpha + ... + alpha^d) / (L + d * E)``."""
        alpha = self.alpha(exit_layer)
        tokens = 1.0
        for _ in range(drafts):
            tokens = 1.0 + alpha * tokens
        return tokens / (self.layers + drafts * exit_layer)

    def select(self) -> tuple[int, int]:
        """Step 8: the (exit, drafts) of largest tokens per layer; ties to the shallowest exit, then the fewest drafts.

        ``drafts`` may be 0: plain decoding beats every draft (the exit is then 1 by the tie rule and means nothing).
        """
        best = (1, 0)
        best_value = self.tpl(1, 0)
        for exit_layer in range(1, self.layers):
            for drafts in range(self.gamma_max + 1):
                value = self.tpl(exit_layer, drafts)
                if value > best_value:
                    best = (exit_layer, drafts)
                    best_value = value
        return best
