"""A small run of `make chaos`, for every day."""

from __future__ import annotations

import pytest

from chaos.faults import KillBroker, KillWorker, Zombie
from chaos.run import Options, run
from loramux_worker.settings import WorkerSettings

pytestmark = [pytest.mark.kafka, pytest.mark.s3]

DELIVERY = WorkerSettings.model_fields["delivery"].default


def test_every_request_is_answered_rightly_whatever_happens(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = (KillWorker.name, KillBroker.name, Zombie.name)
    options = Options(
        requests=300, partitions=6, workers=2, faults=3, adapters=8, seed=6, delivery=DELIVERY, kinds=kinds
    )
    report = run(options, say=print)
    with capsys.disabled():
        print(f"\n{report.to_markdown()}")
    assert report.complaints == []
    assert sorted(wound.kind for wound in report.wounds) == sorted(kinds)
    assert report.verdict.sent == options.requests
    assert report.verdict.telling > 0.9 * options.requests, "the tokens say which adapter answered"
