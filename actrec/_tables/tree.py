"""Names with dots as a tree, along which long tables are folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

#: Deeper than this, the rest of a name is one label: modules do not nest so deep, hostile names do.
DEEPEST = 24


@dataclass(eq=False, slots=True)
class Node:
    """A prefix of names: a row, the parent of other rows, or both."""

    label: str  #: relative to the parent
    prefix: str  #: the whole name up to here
    is_row: bool = False
    children: dict[str, Node] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Yield the names of the rows of this node and below it."""
        if self.is_row:
            yield self.prefix
        for child in self.children.values():
            yield from child.names()


def tree(names: Iterable[str], smallest: int = 2) -> Node:
    """Return the root of the tree of ``names``.

    >>> root = tree(["conv", "blocks.0.a", "blocks.0.b", "blocks.1.a"])
    >>> [(node.label, list(node.children)) for node in root.children.values()]
    [('conv', []), ('blocks', ['0', '1.a'])]

    A name without siblings is one label with its parent's, and a branch with fewer rows than ``smallest`` is part of
    its parent.
    """
    root = Node("", "")
    for name in names:
        node, prefix = root, ""
        for segment in name.split(".", DEEPEST):
            prefix = f"{prefix}.{segment}" if node is not root else segment
            node = node.children.setdefault(segment, Node(segment, prefix))
        node.is_row = True
    _join(root, smallest)
    return root


def _join(node: Node, smallest: int) -> None:
    """Join nodes that have no siblings or too few rows with their parents, from the leaves up."""
    for child in node.children.values():
        _join(child, smallest)
    node.children = dict(_inlined(node, smallest))


def _inlined(node: Node, smallest: int) -> Iterator[tuple[str, Node]]:
    """Yield the children; a branch that is too small is replaced by its own children."""
    for label, child in node.children.items():
        alone = len(child.children) == 1 and not child.is_row
        if child.children and (alone or sum(1 for _ in child.names()) < smallest):
            if child.is_row:
                yield label, Node(label, child.prefix, is_row=True)
            for inner, grandchild in child.children.items():
                joined = f"{label}.{inner}"
                grandchild.label = joined
                yield joined, grandchild
        else:
            yield label, child
