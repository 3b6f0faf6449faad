"""The forest of blocks of one tier: what every policy that gives up leaves first shares."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic

from kvstrata.kvstore_service.eviction import Exempt, Key


class Node(Generic[Key]):
    """One held block.

    Attributes:
        stamp: When it, or a child that is gone, was used last, or what the policy orders by.
        uses: Uses since it came, as far as the policy counts.
        place: Where it waits as a leaf; the policy says what the number means.
        is_held: False once it was given up.
        is_queued: Whether the policy has an entry of it among the leaves.
    """

    __slots__ = ("is_held", "is_queued", "key", "num_bytes", "parent", "place", "stamp", "uses")

    def __init__(self, key: Key, parent: Key | None, num_bytes: int) -> None:
        self.key = key
        self.parent = parent
        self.num_bytes = num_bytes
        self.stamp = self.uses = self.place = 0
        self.is_held = True
        self.is_queued = False


class LeafFirst(ABC, Generic[Key]):
    """Keeps ``EvictionPolicy``'s contract; a policy says how leaves wait and which is next.

    A block gets an entry among the leaves when it becomes one. The entry may outlive that: one
    whose block got a child or is gone is dropped when it is met, so that a use costs O(1).
    """

    def __init__(self) -> None:
        self._nodes: dict[Key, Node[Key]] = {}
        self._children: dict[Key, int] = {}
        self._clock = 0

    @abstractmethod
    def _admitted(self, node: Node[Key]) -> None:
        """Set up a new block."""

    @abstractmethod
    def _used(self, node: Node[Key]) -> None:
        """Count a use."""

    @abstractmethod
    def _add_entry(self, node: Node[Key]) -> None:
        """Let a block that became a leaf wait."""

    @abstractmethod
    def _coldest(self) -> Node[Key] | None:
        """Take the leaf that should go next out of the waiting ones; None without any."""

    @abstractmethod
    def _entries(self) -> Sequence[Node[Key]]:
        """Return the nodes of all entries, stale ones too."""

    def _evicted(self, nodes: Sequence[Node[Key]]) -> None:
        """Learn which blocks are gone for good."""

    def _resized(self, node: Node[Key], change: int) -> None:
        """Learn that the bytes held of ``node`` change, also when it comes and goes."""

    def insert(self, key: Key, parent: Key | None, num_bytes: int) -> None:
        """See ``EvictionPolicy.insert``."""
        self._clock += 1
        node = self._nodes.get(key)
        if node is not None:
            self._used(node)
            self.resize(key, num_bytes)
            return
        node = Node(key, None if parent == key else parent, num_bytes)
        self._admitted(node)
        self._link(node)

    def touch(self, key: Key) -> None:
        """See ``EvictionPolicy.touch``."""
        self._clock += 1
        node = self._nodes.get(key)
        if node is not None:
            self._used(node)

    def resize(self, key: Key, num_bytes: int) -> None:
        """See ``EvictionPolicy.resize``."""
        node = self._nodes.get(key)
        if node is not None:
            self._resized(node, num_bytes - node.num_bytes)
            node.num_bytes = num_bytes

    def remove(self, key: Key) -> None:
        """See ``EvictionPolicy.remove``."""
        node = self._nodes.get(key)
        if node is not None:
            self._unlink(node)

    def evict(self, num_bytes: int, is_exempt: Exempt[Key]) -> list[Key] | None:
        """See ``EvictionPolicy.evict``. An exempt leaf that is met counts as used."""
        taken: list[Node[Key]] = []
        spared: list[Node[Key]] = []
        hidden: list[Node[Key]] = []
        while num_bytes > 0:
            node = self._coldest()
            if node is not None and is_exempt(node.key):
                spared.append(node)
            elif node is not None:
                self._unlink(node)
                taken.append(node)
                num_bytes -= node.num_bytes
            elif spared:
                # Only ancestors of exempt blocks are left: they surface once those are hidden.
                for exempt in spared:
                    self._unlink(exempt)
                hidden += spared
                spared = []
            else:
                break
        for node in hidden:
            self._link(node)
        for node in (*spared, *hidden):
            node.stamp = self._clock
            self._enqueue(node)
        if num_bytes > 0:
            for node in reversed(taken):
                self._link(node)
            return None
        self._evicted(taken)
        return [node.key for node in taken]

    def _link(self, node: Node[Key]) -> None:
        node.is_held = True
        self._nodes[node.key] = node
        self._resized(node, node.num_bytes)
        if node.parent is not None:
            self._children[node.parent] = self._children.get(node.parent, 0) + 1
        self._enqueue(node)

    def _unlink(self, node: Node[Key]) -> None:
        """Take ``node`` out; its parent, if that was the last child, is a leaf of the same age."""
        node.is_held = False
        del self._nodes[node.key]
        self._resized(node, -node.num_bytes)
        if node.parent is None:
            return
        siblings = self._children[node.parent] - 1
        if siblings:
            self._children[node.parent] = siblings
            return
        del self._children[node.parent]
        parent = self._nodes.get(node.parent)
        if parent is not None:
            parent.stamp = max(parent.stamp, node.stamp)
            self._enqueue(parent)

    def _enqueue(self, node: Node[Key]) -> None:
        if not node.is_queued and not self._is_stale(node):
            node.is_queued = True
            self._add_entry(node)

    def _is_stale(self, node: Node[Key]) -> bool:
        """Whether an entry of ``node`` means nothing: it is gone, or no leaf."""
        return not node.is_held or node.key in self._children

    def __len__(self) -> int:
        """Return the number of blocks known."""
        return len(self._nodes)

    def check_integrity(self) -> None:
        """See ``EvictionPolicy.check_integrity``."""
        children: dict[Key, int] = {}
        for node in self._nodes.values():
            assert node.is_held, f"{node.key} is known but not held"
            if node.parent is not None:
                children[node.parent] = children.get(node.parent, 0) + 1
        assert children == self._children, "the policy miscounts children"
        queued = [node.key for node in self._entries() if node.is_held]
        waiting = set(queued)
        assert len(queued) == len(waiting), "a block waits twice"
        lost = self._nodes.keys() - self._children.keys() - waiting
        assert not lost, f"{len(lost)} leaves wait nowhere"
