"""What each adapter may have: its weight in the fair queue and its limits."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Annotated

import msgspec

from loramux_worker.adapter_labels import BASE

AboveZero = Annotated[float, msgspec.Meta(gt=0)]


class AdapterPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weight and limits of each adapter whose id matches `pattern` (fnmatch, case matters; `base`
    alone is the base model).

    Limits are of one engine. What is beyond them waits, it does not fail.
    """

    pattern: str
    weight: AboveZero = 1.0
    """Service, relative to an adapter of weight 1, while both have requests waiting."""
    tokens_per_second: AboveZero | None = None
    """Prompt and generated tokens, in the long run; up to a second's worth, and one request more, at once."""
    max_running: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Requests that run at the same time."""


class Policies:
    """Finds an adapter's policy: the first whose pattern matches, else weight 1 without limits."""

    _DEFAULT = AdapterPolicy("*")

    def __init__(self, policies: Iterable[AdapterPolicy] = ()) -> None:
        policies = tuple(policies)
        self._base_model = next((policy for policy in policies if policy.pattern == BASE), self._DEFAULT)
        self._adapters = [
            (re.compile(fnmatch.translate(policy.pattern)).match, policy)
            for policy in policies
            if policy.pattern != BASE
        ]

    def of(self, adapter_id: str | None) -> AdapterPolicy:
        """The policy of an adapter; None is the base model."""
        if adapter_id is None:
            return self._base_model
        return next((policy for matches, policy in self._adapters if matches(adapter_id)), self._DEFAULT)
