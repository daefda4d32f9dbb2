"""An engine that dies of certain prompts, without a model: `python tests/dying_engine.py ADDRESS`.

It speaks the engine's protocol as `loramux_worker.engine.process` does. Token n of any answer is the number n.
A prompt `[DEADLY, n]` kills the process once n tokens are out, whichever process it is; `[ONCE, n]` does so only to the
one that began the sequence.
"""

from __future__ import annotations

import os
import sys
import threading

import msgspec
import zmq

from loramux_worker.engine.protocol import (
    PROTOCOL_VERSION,
    Outputs,
    Ready,
    SequenceOutput,
    SequenceTiming,
    Stop,
    Submit,
    decode_front_message,
    encode,
)

DEADLY, ONCE = 13, 7


def main() -> None:
    msgspec.json.decode(sys.stdin.buffer.readline())
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(sys.argv[1])
    socket.send(encode(Ready(PROTOCOL_VERSION, 512, 320, 100, 16, "cpu", "float32")))
    while not isinstance(message := decode_front_message(socket.recv()), Stop):
        if isinstance(message, Submit):
            answer(socket, message)
    socket.close(linger=0)


def answer(socket: zmq.Socket[bytes], submit: Submit) -> None:
    kind, *rest = submit.prompt_token_ids
    began_here = not submit.generated_token_ids
    fatal_at = rest[0] if kind == DEADLY or (kind == ONCE and began_here) else None
    last = submit.sampling.max_new_tokens - 1
    for n in range(len(submit.generated_token_ids), last + 1):
        if fatal_at is not None and n >= fatal_at:
            socket.close(linger=1000)  # what was said before is heard
            socket.context.term()
            os._exit(139)
        output = SequenceOutput(submit.sequence_id, n, "length" if n == last else None)
        timings = [SequenceTiming(submit.sequence_id, 0.0, 0.0, 0.0, 0.0)] if n == last else []
        socket.send(encode(Outputs([output], timings)))


if __name__ == "__main__":
    main()
