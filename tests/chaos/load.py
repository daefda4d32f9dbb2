"""The requests of a run, and a plain producer that sends them in bursts at the rate of the moment."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

import orjson
from confluent_kafka import KafkaError, Message, Producer

from chaos.answer_book import MAX_NEW_TOKENS, AnswerBook
from chaos.quiet import quiet_options

TICK = 0.02  # seconds
LARGEST_BURST = 120  # requests
SMALL_BURST = 24
STREAMED = 0.15  # of all requests


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the run."""

    request_id: str
    adapter_id: str | None
    prompt: str
    max_new_tokens: int
    stream: bool
    partition: int

    def to_json(self) -> bytes:
        """The request's value."""
        parameters = {"max_new_tokens": self.max_new_tokens}
        return orjson.dumps(
            {
                "request_id": self.request_id,
                "adapter_id": self.adapter_id,
                "prompt": self.prompt,
                "parameters": parameters,
                "stream": self.stream,
            }
        )


def draw_asks(generator: random.Random, book: AnswerBook, count: int, partitions: int, name: str) -> list[Ask]:
    """`count` requests for random prompts and adapters, of 1 to MAX_NEW_TOKENS tokens; ids are `name-number`."""
    pairs = list(book.answers)
    asks = []
    for i in range(count):
        prompt, adapter_id = generator.choice(pairs)
        asks.append(
            Ask(
                request_id=f"{name}-{i:06d}",
                adapter_id=adapter_id,
                prompt=prompt,
                max_new_tokens=generator.randint(1, MAX_NEW_TOKENS),
                stream=generator.random() < STREAMED,
                partition=generator.randrange(partitions),
            )
        )
    return asks


class Load:
    """Sends asks from a thread of its own, from `start` to `stop`: `allowed` more, `rate` a second on average.

    `sent` says when each was handed to the producer (monotonic seconds), `acknowledged` which ones the broker has:
    those must be answered. The producer is idempotent, so that no request is in the topic twice.
    """

    def __init__(self, servers: str, topic: str, asks: list[Ask], generator: random.Random) -> None:
        self.rate = 0.0
        self.allowed = 0
        self.asks = {ask.request_id: ask for ask in asks}
        self.sent: dict[str, float] = {}
        self.acknowledged: set[str] = set()
        self.failures: list[str] = []
        self._topic = topic
        self._waiting = list(reversed(asks))
        self._generator = generator
        self._producer = Producer(
            {
                **quiet_options(servers),
                "enable.idempotence": True,
                "linger.ms": 2,
                "delivery.timeout.ms": 120_000,
                "topic.metadata.refresh.interval.ms": 5_000,
            }
        )
        self._ending = threading.Event()
        self._burst_now = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    @property
    def left(self) -> int:
        """Requests that were not sent yet."""
        return len(self._waiting)

    @property
    def is_over(self) -> bool:
        """Whether all were sent, and every one acknowledged or failed."""
        self.poll()
        return not self._waiting and len(self.acknowledged) + len(self.failures) == len(self.sent)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def send(self, count: int) -> None:
        """Send the next `count` requests now (for a load that was not started)."""
        for _ in range(min(count, self.left)):
            self._send_one()
        self._producer.poll(0)

    def burst(self) -> None:
        """Send a burst now, whatever the rate is (for a load that was started)."""
        self._burst_now.set()

    def poll(self) -> None:
        """Take in acknowledgements (for a load that was not started)."""
        self._producer.poll(0)

    def _run(self) -> None:
        credit, burst = 0.0, 1
        before = time.monotonic()
        while not self._ending.wait(TICK):
            now = time.monotonic()
            credit += (now - before) * self.rate
            before = now
            if self._burst_now.is_set():
                self._burst_now.clear()
                self.send(SMALL_BURST)
            if credit >= burst:  # requests come in bursts: what dies, dies with work in hand
                self.send(min(burst, self.allowed))
                self.allowed -= min(burst, self.allowed)
                credit = 0.0
                burst = self._generator.randint(1, LARGEST_BURST)
            self._producer.poll(0)

    def _send_one(self) -> None:
        ask = self._waiting.pop()

        def acknowledged(error: KafkaError | None, message: Message) -> None:
            if error is None:
                self.acknowledged.add(ask.request_id)
            else:
                self.failures.append(f"{ask.request_id}: {error.str()}")

        self.sent[ask.request_id] = time.monotonic()
        key = (ask.adapter_id or "").encode()
        self._producer.produce(self._topic, ask.to_json(), key, ask.partition, on_delivery=acknowledged)
