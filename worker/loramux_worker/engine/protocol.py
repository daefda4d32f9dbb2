"""What the front and an engine say to each other.

    front → engine   Submit, Cancel, Prefetch, Stop
    engine → front   Ready, Refused, Outputs, Failed, AdapterMoved, Stats

Frozen `msgspec` structs, one MessagePack array a message, over a ZeroMQ pair socket: nothing that came from a
request is ever pickled. `PROTOCOL_VERSION` travels in `Ready`; a front refuses an engine that speaks another.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 3


SOURCES = {"disk": "store", "host": "disk", "gpu": "host"}
"""Tier → where what comes into it comes from."""


class AdapterReference(msgspec.Struct, frozen=True, array_like=True):
    """An adapter whose files lie verified in the disk tier: what an engine needs to load it."""

    adapter_id: str
    revision: str
    path: str

    @property
    def key(self) -> tuple[str, str]:
        """(adapter_id, revision): the key of every cache, pool slot and KV block."""
        return (self.adapter_id, self.revision)


class SamplingParameters(msgspec.Struct, frozen=True, array_like=True):
    """The contract's parameters that act on tensors. `temperature` 0 is greedy; `seed` is always set."""

    max_new_tokens: int
    min_new_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Generate. `generated_token_ids` are tokens that another engine already produced for this sequence."""

    sequence_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParameters
    adapter: AdapterReference | None = None
    priority: int = 0
    deadline: float | None = None  # Unix time, seconds
    generated_token_ids: list[int] = []
    fewest_tokens: int = 1  # it cannot end with fewer generated


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Forget a sequence in any state; no further word about it comes back."""

    sequence_id: int


class Prefetch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Bring an adapter into the host tier: a request for it is on its way."""

    adapter: AdapterReference


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End the process; sequences still running are dropped."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is loaded and checked: the engine takes requests."""

    protocol_version: int
    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    device: str
    dtype: str


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine cannot serve with these settings; the process ends after this one line."""

    message: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one generated token: its own, and the top n as (token id, log-probability)."""

    logprob: float
    top: list[tuple[int, float]]


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """One step's token of one sequence. `finish_reason` is set on the last: length, eos_token or stop_sequence."""

    sequence_id: int
    token_id: int
    finish_reason: str | None = None
    logprobs: TokenLogprobs | None = None


class SequenceTiming(msgspec.Struct, frozen=True, array_like=True):
    """Seconds a finished sequence spent in the engine: waiting, waiting for its adapter, prefill, decode."""

    sequence_id: int
    queue: float
    adapter: float
    prefill: float
    decode: float


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What one step produced; `timings` has an entry for each sequence that finished in it."""

    outputs: list[SequenceOutput]
    timings: list[SequenceTiming] = []


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A sequence ended without an answer: `code` is one of the contract's error codes."""

    sequence_id: int
    code: str
    message: str


class AdapterMoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An adapter has come into a tier, `disk`, `host` or `gpu`, at `at` (Unix time), `seconds` after that was begun.

    To the disk: from a free slot for downloads on. Into the host tier: from the first asking on. Into the pool: as long
    as the engine's loop was held by it; on a GPU the copy itself goes on beside the steps.
    """

    adapter: AdapterReference
    tier: str
    at: float
    seconds: float


class AdapterStats(msgspec.Struct, frozen=True, array_like=True):
    """How one adapter fares in the fair queue; `adapter` is its label: an id, `base`, or `other` for all the rest.

    Service is in weighted tokens. `deficit` is what the adapter, as long as it waits, was given less than the most
    served of those that wait, times its weight.
    """

    adapter: str
    service_total: float
    queue_seconds_total: float  # from ready to its first step, of those that began
    started_total: int
    running: int
    waiting: int
    deficit: float


class Stats(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A picture of the engine for metrics and for the pool's choice, sent at most a few times a second.

    Bytes are bytes, times are seconds; the counters (`*_total`) grow from the start of the process.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks: int
    preemptions_total: int
    steps_total: int
    step_seconds_total: float
    batch_sequences: int
    batch_adapters: int
    host_adapters: int
    host_bytes: int
    gpu_adapters: int
    gpu_bytes: int
    host_evictions_total: int
    gpu_evictions_total: int
    host_hits_total: int
    host_misses_total: int
    gpu_hits_total: int
    gpu_misses_total: int
    batch_ranks: int
    host_capacity_bytes: int
    gpu_capacity_bytes: int
    adapters: list[AdapterStats]


FrontMessage = Submit | Cancel | Prefetch | Stop
EngineMessage = Ready | Refused | Outputs | Failed | AdapterMoved | Stats

encode = msgspec.msgpack.Encoder().encode
decode_front_message = msgspec.msgpack.Decoder(FrontMessage).decode
decode_engine_message = msgspec.msgpack.Decoder(EngineMessage).decode
