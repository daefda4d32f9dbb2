"""The deltas of one streamed request, in order and each once. Knows no Kafka."""

from __future__ import annotations

from loramux_schemas import Reply, Request, StreamDelta


class DeltaBuffer:
    """Puts deltas in order by index, drops the second of two, and completes the text from the final reply.

    Stream and replies are two topics: the final reply may be read before the last deltas. What they would
    have said is in the reply, so nobody waits for them.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._next_index = 0
        self._ahead: dict[int, StreamDelta] = {}
        self._text = ""
        self._num_tokens = 0

    def push(self, delta: StreamDelta) -> None:
        """A delta as it was read, in any order, any number of times."""
        if delta.index >= self._next_index:
            self._ahead.setdefault(delta.index, delta)

    def pop(self) -> StreamDelta | None:
        """The next delta in order, if it is there."""
        delta = self._ahead.pop(self._next_index, None)
        if delta is not None:
            self._next_index += 1
            self._text += delta.text
            self._num_tokens += len(delta.token_ids)
        return delta

    def rest(self, reply: Reply) -> StreamDelta | None:
        """What the final reply says beyond the deltas popped so far, as one last delta; None if nothing.

        None too where the reply does not continue what was streamed (a request that was generated twice and
        sampled differently), and where it begins with a prompt whose text we do not know (`return_full_text`
        of messages or token ids): `reply.generated_text` is the answer then.
        """
        text = reply.generated_text or ""
        if self._request.parameters.return_full_text:
            prompt = self._request.prompt
            if prompt is None or not text.startswith(prompt):
                return None
            text = text.removeprefix(prompt)
        if not text.startswith(self._text):
            return None
        text = text.removeprefix(self._text)
        token_ids = (reply.token_ids or ())[self._num_tokens :]
        if not text and not token_ids:
            return None
        return StreamDelta(request_id=self._request.request_id, index=self._next_index, text=text, token_ids=token_ids)
