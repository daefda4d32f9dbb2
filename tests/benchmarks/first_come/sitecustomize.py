"""Turns a worker into one that serves first come, first served: the rival of `bench_fairness.py`.

Python imports this at its start when the folder is on PYTHONPATH, in the front and in its engines. All requests are
then of one adapter to whoever decides whose turn it is, and of their own to whoever computes them: the same worker,
with the same work for each request, whose window and queue know nothing but the order of arrival.
"""

import dataclasses
import sys

from loramux_worker import front
from loramux_worker.scheduler import fair_queue

_glance = front.glance


def _of_everybody(record):
    return dataclasses.replace(_glance(record), adapter_id=None)


front.glance = _of_everybody
fair_queue._adapter_id = lambda key: None
print("first come, first served", file=sys.stderr, flush=True)
