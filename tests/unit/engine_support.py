"""An engine in the process of the test, and requests for it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

from loramux_worker.engine.build import EngineParts, assemble, build_engine
from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import (
    AdapterReference,
    Failed,
    Outputs,
    SamplingParameters,
    SequenceTiming,
    Submit,
    TokenLogprobs,
)
from loramux_worker.model.loader import ServedModel
from tiny_models import TinyModel

EOS = 257

_LIMITS: dict[str, dict[str, object]] = {
    "cpu": {},
    "cuda": {"max_batch_sequences": 16, "max_batched_tokens": 64},  # each engine captures a graph for each size
}


class Recorder:
    """An engine in this process, and what it said about each sequence.

    `served` is the model where the test has made one itself; it is the engine's own afterwards.
    """

    def __init__(
        self,
        model: TinyModel,
        device: str,
        *,
        pipeline_depth: int | None = None,
        served: ServedModel | None = None,
        **config: object,
    ) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.finish_reasons: dict[int, str] = {}
        self.failures: dict[int, Failed] = {}
        self.logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self.timings: dict[int, SequenceTiming] = {}
        settings = {"dtype": "float32", **_LIMITS[device], **config}
        engine_config = EngineConfig(model=str(model.path), device=device, **settings)
        self.parts: EngineParts
        if served is None:
            self.parts = build_engine(engine_config, self._hear, pipeline_depth=pipeline_depth)
        else:
            self.parts = assemble(engine_config, served, self._hear, pipeline_depth=pipeline_depth)

    @property
    def has_replayed_graphs(self) -> bool:
        """Whether any step ran as a CUDA graph."""
        graphs = self.parts.runner.graphs
        return graphs is not None and graphs.last is not None

    def _hear(self, message: object) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                assert output.sequence_id not in self.finish_reasons, "a token after the last one"
                self.tokens.setdefault(output.sequence_id, []).append(output.token_id)
                self.logprobs.setdefault(output.sequence_id, []).append(output.logprobs)
                if output.finish_reason is not None:
                    self.finish_reasons[output.sequence_id] = output.finish_reason
            self.timings |= {timing.sequence_id: timing for timing in message.timings}
        elif isinstance(message, Failed):
            self.failures[message.sequence_id] = message

    def load(self, references: Iterable[AdapterReference], seconds: float = 60.0) -> None:
        """Wait until adapters are in memory: which steps follow then does not depend on how fast they came."""
        adapters = self.parts.adapters
        missing = {reference.key for reference in references}
        for reference in references:
            adapters.prefetch(reference)
        until = time.monotonic() + seconds
        while missing:
            for loaded in adapters.poll():
                assert loaded.error is None, loaded.error
                missing.discard(loaded.key)
            assert time.monotonic() < until, f"not loaded: {missing}"
            time.sleep(0.001)

    def run(self, submissions: list[Submit], seconds: float = 300.0) -> None:
        """Submit in batches while stepping, until every sequence has ended."""
        engine = self.parts.engine
        waiting = list(submissions)
        until = time.monotonic() + seconds
        while waiting or engine.has_work:
            for submission in waiting[:3]:
                engine.handle(submission)
            waiting = waiting[3:]
            engine.step()
            self.parts.scheduler.check_integrity()
            assert time.monotonic() < until, "the engine does not end"
        self.parts.adapters.pool.check_integrity()


def submissions_for(model: TinyModel, *, count: int, most_prompt: int, new_tokens: int, seed: int) -> list[Submit]:
    rng = random.Random(seed)
    references = [AdapterReference(a, "sha256:0", str(model.adapters / a)) for a in model.adapter_ids]
    submissions = []
    for i in range(count):
        length = (1, most_prompt)[i] if i < 2 else rng.randint(1, most_prompt)
        prompt = [rng.randrange(256) for _ in range(length)]
        adapter = None if i % 5 == 4 else references[i % len(references)]
        sampling = SamplingParameters(new_tokens, eos_token_ids=(EOS,))
        submissions.append(Submit(i, prompt, sampling, adapter))
    return submissions
