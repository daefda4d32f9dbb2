"""Stop strings in a stream of text, whatever way the text is cut into pieces."""

from __future__ import annotations


class StopStrings:
    """Passes text on until a stop string is complete; the answer ends before it.

    Text that may be the beginning of a stop string is held back until it is known not to be. The first stop string
    to be completed wins, at the same end the longest: the outcome depends on the text alone, not on its pieces.
    Raises `ValueError` for an empty stop string.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, once there is one."""
        return self._matched

    def push(self, text: str) -> str:
        """Take the next piece; returns the text that is safe to give out now, nothing once `matched` is set."""
        if self._matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        match = self._first_match()
        if match is None:
            return self._release(self._hold_from())
        start, self._matched = match
        safe = self._release(start)
        self._held = ""
        return safe

    def finish(self) -> str:
        """The text is complete; returns what was held back, nothing if a stop string has come."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        safe, self._held = self._held[:count], self._held[count:]
        return safe

    def _first_match(self) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first, the longest of these; None if there is none."""
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _hold_from(self) -> int:
        """Where the longest suffix begins that a stop string could begin with."""
        held = self._held
        hold = len(held)
        for stop in self._stops:
            start = held.find(stop[0], max(0, len(held) - len(stop) + 1), hold)
            while start >= 0 and not stop.startswith(held[start:]):
                start = held.find(stop[0], start + 1, hold)
            if start >= 0:
                hold = start
        return hold
