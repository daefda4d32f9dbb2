"""PEFT's rules for which module a name or pattern of an adapter's config means.

The patterns are regular expressions written by whoever made the adapter. Python's `re` cannot be interrupted and
holds the interpreter while it backtracks, so one bad pattern would stop every request of the engine. Plain names
(nearly all there are) are therefore compared without it, and the others run in the `regex` package with a budget of
processor time for the whole adapter.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable

import regex  # type: ignore[import-untyped]

from loramux_worker.adapters.invalid import AdapterInvalid, quoted

_MAX_PATTERN_CHARS = 16_384
_MAX_GROUP_DEPTH = 10  # `regex` takes twice the time and memory to compile for each level of nested repeats
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.-]+")
# `{e<=1}` is literal text to `re` but approximate matching to `regex`; comments would hide parentheses from the count
_UNSUPPORTED = re.compile(r"\{[^0-9,}]|\(\?[a-zA-Z]*x|\(\?#")
_ESCAPES_AND_CLASSES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


class PatternMatcher:
    """Matches the patterns of one adapter, with `seconds` of processor time from its construction.

    Every method raises AdapterInvalid for a pattern that is no regular expression, or when the time is used up.
    """

    def __init__(self, seconds: float = 1.0) -> None:
        self._deadline = time.thread_time() + seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def matches_whole(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches the whole of a module's name: `target_modules` and `exclude_modules`."""
        timeout = self._seconds_left(pattern)
        return _run(self._compile(pattern, pattern).fullmatch, pattern, name, timeout) is not None

    def first_match(self, patterns: Iterable[str], name: str) -> str | None:
        """The first pattern that matches the name or its end after a dot: `rank_pattern` and `alpha_pattern`.

        PEFT's `get_pattern_key`, which is `re.match(rf"(.*\\.)?({pattern})$", name)`.
        """
        for pattern in patterns:
            timeout = self._seconds_left(pattern)
            if _PLAIN.fullmatch(pattern):
                if _plain_match(pattern, name):
                    return pattern
                continue
            compiled = self._compile(pattern, rf"(.*\.)?({pattern})$")
            if _run(compiled.match, pattern, name, timeout) is not None:
                return pattern
        return None

    def layer_index(self, patterns: tuple[str, ...], name: str) -> int | None:
        """The layer that a module belongs to, for `layers_to_transform`.

        Without `patterns` (`layers_pattern` of the config) it is the first numbered segment of the name.
        """
        for pattern in patterns:
            timeout = self._seconds_left(pattern)
            compiled = self._compile(pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
            match = _run(compiled.match, pattern, name, timeout)
            if match is not None:
                return None if match["idx"] is None else int(match["idx"])
        found = None if patterns else _LAYER_INDEX.match(name)
        return None if found is None else int(found["index"])

    def _seconds_left(self, pattern: str) -> float:
        left = self._deadline - time.thread_time()
        if left <= 0:
            raise AdapterInvalid(f"its patterns take too long to match (last {quoted(pattern)})")
        return left

    def _compile(self, pattern: str, expression: str) -> regex.Pattern[str]:
        if (compiled := self._compiled.get(expression)) is not None:
            return compiled
        if len(pattern) > _MAX_PATTERN_CHARS or _group_depth(pattern) > _MAX_GROUP_DEPTH:
            raise AdapterInvalid(f"the pattern {quoted(pattern)} is too large")
        if _UNSUPPORTED.search(pattern):
            raise AdapterInvalid(f"the pattern {quoted(pattern)} has a comment, or a brace that is no repeat count")
        try:
            re.compile(expression)  # what is an error to PEFT is one here
            compiled = regex.compile(expression)
        except Exception as error:  # re.error, RecursionError, OverflowError, a warning made an error …
            raise AdapterInvalid(f"the pattern {quoted(pattern)} is wrong: {quoted(str(error))}") from None
        self._compiled[expression] = compiled
        return compiled


def ends_with_any(name: str, endings: frozenset[str]) -> bool:
    """Whether the name, or its end after one of its dots, is in `endings`: PEFT's rule for a list of modules."""
    if name in endings:
        return True
    return any(name[i + 1 :] in endings for i, char in enumerate(name) if char == ".")


def _plain_match(pattern: str, name: str) -> bool:
    """What `(.*\\.)?(pattern)$` says for a pattern of word characters and dots; a dot is any character."""
    wanted = pattern.removeprefix("^")
    start = len(name) - len(wanted)
    if start < 0 or (start > 0 and (wanted is not pattern or name[start - 1] != ".")):
        return False
    end = name[start:]
    return end == wanted or all(want in (".", char) for want, char in zip(wanted, end, strict=True))


def _run(
    match: Callable[..., regex.Match[str] | None], pattern: str, name: str, timeout: float
) -> regex.Match[str] | None:
    try:
        return match(name, timeout=timeout, concurrent=True)
    except TimeoutError:
        raise AdapterInvalid(f"the pattern {quoted(pattern)} takes too long to match") from None


def _group_depth(pattern: str) -> int:
    """How deep parentheses nest."""
    depth = deepest = 0
    for char in _ESCAPES_AND_CLASSES.sub("", pattern):
        if char == "(":
            depth += 1
            deepest = max(deepest, depth)
        elif char == ")":
            depth -= 1
    return deepest
