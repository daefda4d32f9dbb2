"""An archive of the classes that a broker loads, with which Java starts it in half the time.

    python -m services.kafka_classes        (in tests/)

A broker runs once and leaves the archive beside Kafka's jars. Nothing needs it: Java passes over one that another Java
or other jars have made. It would not survive half of one, so what a broker leaves that was killed meanwhile is no
archive. Where it is there already, or Kafka is not, nothing is done.
"""

from __future__ import annotations

import signal
import sys
import time

from services.install import ServiceMissing, kafka_classes, kafka_libs
from services.kafka import KafkaCluster
from services.process import ServerFailed

SECONDS = 120.0
ENDED = 128 + signal.SIGTERM  # the exit code of a Java that was asked to end, and has


def main() -> None:
    """Makes the archive, unless it is there."""
    classes = kafka_classes()
    try:
        kafka_libs()
    except ServiceMissing:
        return
    if classes.is_file():
        return
    started = time.monotonic()
    new = classes.with_suffix(".new")
    try:
        with KafkaCluster(java=[f"-XX:ArchiveClassesAtExit={new}"]) as kafka:
            kafka.create_topic("any", 2)
            code = kafka.stop_broker(0, SECONDS)  # which is when Java writes it
    except ServerFailed as failure:
        print(f"services: no archive of Kafka's classes: {failure}", file=sys.stderr, flush=True)
        return
    if code == ENDED and new.is_file():
        new.replace(classes)
        print(f"services: Kafka's classes are in {classes} ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
