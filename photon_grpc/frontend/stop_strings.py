"""Stop strings, matched on text as it is generated, wherever token and delta borders fall.

A match ends at the *first character that completes* any stop string; of several that end there, the
longest one wins, because it cuts the most. That is what a reader who watched the text character by
character would see, so the result does not depend on how the text was cut into pushes. Text that
could still become a stop string is held back: precisely the longest suffix that is a proper prefix
of one of them, which is the depth of the current node of an Aho-Corasick automaton (Aho and Corasick
1975). Each character costs amortised constant time.

Must not know tokens or the transport. Pure; used from the event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

_ROOT = 0


class StopAutomaton:
    """The stop strings of one request as a trie with failure links; shared by its completions.

    A node stands for a prefix of a stop string. Empty strings are a programmer's error: validation
    refuses them before.
    """

    __slots__ = ("_children", "_depth", "_failure", "_match")

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "an empty stop string would match everywhere"
        self._children: list[dict[str, int]] = [{}]
        self._depth: list[int] = [0]
        self._match: list[str | None] = [None]
        for string in strings:
            self._insert(string)
        self._failure = [_ROOT] * len(self._children)
        self._link()

    def _insert(self, string: str) -> None:
        node = _ROOT
        for char in string:
            child = self._children[node].get(char)
            if child is None:
                child = len(self._children)
                self._children[node][char] = child
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = child
        self._match[node] = string

    def _link(self) -> None:
        # Breadth first, so that the node a link leads to is already finished.
        queue = deque(self._children[_ROOT].values())
        while queue:
            node = queue.popleft()
            for char, child in self._children[node].items():
                self._failure[child] = self._follow(self._failure[node], char)
                queue.append(child)
            if self._match[node] is None:
                self._match[node] = self._match[self._failure[node]]

    def _follow(self, node: int, char: str) -> int:
        children = self._children
        while True:
            target = children[node].get(char)
            if target is not None:
                return target
            if node == _ROOT:
                return _ROOT
            node = self._failure[node]

    def step(self, node: int, char: str) -> tuple[int, str | None]:
        """The node after `char`, and the longest stop string that ends with it, if any."""
        node = self._follow(node, char)
        match = self._match[node]
        # A node without children is a whole stop string; nothing longer can grow from it, so only
        # what its failure link stands for is still worth holding back.
        while node != _ROOT and not self._children[node]:
            node = self._failure[node]
        return node, match

    def depth(self, node: int) -> int:
        """How many of the last characters could be the beginning of a stop string."""
        return self._depth[node]


class StopMatcher:
    """Lets text through up to the first stop string.

    `push` takes the text of the next token or tokens. With `armed` false (fewer than `min_tokens` are
    out, the token of this text included) a stop string that ends inside this text is ignored and goes
    out as ordinary text; one that begins here and ends in a later, armed push still counts. A caller
    with `min_tokens` therefore pushes token by token until it is reached.
    """

    __slots__ = ("_automaton", "_held", "_include_stop", "_matched", "_node")

    def __init__(self, strings: Sequence[str] | StopAutomaton, include_stop: bool) -> None:
        self._automaton = strings if isinstance(strings, StopAutomaton) else StopAutomaton(strings)
        self._include_stop = include_stop
        self._node = _ROOT
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, once there is one."""
        return self._matched

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """Take `text`; return what may be sent now, and the stop string if one was completed.

        The safe text ends before the match, or after it with `include_stop`. After a match every
        further push returns nothing: the completion is over.
        """
        if self._matched is not None:
            return "", None
        step = self._automaton.step
        node = self._node
        for position, char in enumerate(text, start=1):
            node, match = step(node, char)
            if match is not None and armed:
                whole = self._held + text[:position]
                self._matched = match
                self._held = ""
                return (whole if self._include_stop else whole[: len(whole) - len(match)]), match
        self._node = node
        whole = self._held + text
        safe = len(whole) - self._automaton.depth(node)
        self._held = whole[safe:]
        return whole[:safe], None

    def flush(self) -> str:
        """The text still held back, once it is known that nothing follows."""
        held, self._held, self._node = self._held, "", _ROOT
        return held
