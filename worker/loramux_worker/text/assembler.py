"""Generated tokens to the text of the answer: detokenised, cut at a stop string, given out in safe pieces."""

from __future__ import annotations

from loramux_worker.text.detokenizer import IncrementalDetokenizer
from loramux_worker.text.stop_strings import StopStrings


class TextAssembler:
    """The text of one answer as its tokens come.

    A piece that was given out is never taken back: it holds no broken character and not the beginning of a stop
    string that may yet complete. All pieces together are `text`.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: the answer ends before it."""
        return self._stops.matched is not None

    @property
    def text(self) -> str:
        """What has been given out so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that is safe to give out now, often empty."""
        return self._give(self._stops.push(self._detokenizer.push([token_id])))

    def finish(self) -> str:
        """The answer is complete; returns what was held back."""
        if self.stopped:
            return ""
        piece = self._stops.push(self._detokenizer.finish())
        return self._give(piece if self.stopped else piece + self._stops.finish())

    def _give(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
