"""OpenTelemetry spans of requests, from Kafka's timestamp to the sent reply, exported by OTLP over HTTP.

    process lora.requests           under the span that the header `traceparent` names
    ├── kafka.queue                 in Kafka, and until this worker took it
    ├── prepare                     the adapter's files to the disk, its tokenizer, the prompt
    ├── adapter.load                one for each tier that the adapter had to come into meanwhile
    ├── engine.adapter              waiting for the adapter's weights
    ├── engine.queue                waiting for room in a batch
    ├── engine.prefill, engine.decode
    ├── answer                      detokenizing the rest and writing the reply
    └── publish                     until Kafka has acknowledged it

All of a request's spans are made when it is answered, from times that are taken anyway. Nobody imports this module
unless traces are asked for. The SDK reads the standard variables (`OTEL_TRACES_SAMPLER`, `OTEL_RESOURCE_ATTRIBUTES`,
`OTEL_EXPORTER_OTLP_HEADERS`, …).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from loramux_schemas import Reply
from loramux_worker.engine.protocol import SOURCES, AdapterMoved
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.stopwatch import Stage, Stopwatch

log = structlog.get_logger(__name__)

_MAX_ADAPTERS = 4096  # whose latest loads are remembered
_MAX_LOADS = 8  # of each
_CARRIED = ("traceparent", "tracestate")


class Tracing:
    """Makes spans and sends them in the background; what a collector does not take is dropped."""

    def __init__(self, endpoint: str, worker: str, group_id: str) -> None:
        resource = Resource.create({"service.instance.id": worker, "service.version": version("loramux")})
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "loramux"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("loramux", version("loramux"))
        self._propagator = TraceContextTextMapPropagator()
        self._group_id = group_id
        self._loads: OrderedDict[tuple[str, str], deque[Stage]] = OrderedDict()

    def moved(self, moved: AdapterMoved) -> None:
        """Remember an adapter's way into a tier, for the requests that wait for it."""
        key = moved.adapter.key
        loads = self._loads.setdefault(key, deque(maxlen=_MAX_LOADS))
        loads.append(Stage(moved.tier, moved.at - moved.seconds, moved.at))
        self._loads.move_to_end(key)
        if len(self._loads) > _MAX_ADAPTERS:
            self._loads.popitem(last=False)

    def answered(self, record: Record, answers: Sequence[OutgoingRecord], watch: Stopwatch) -> None:
        """Make the spans of a record whose answers have just been sent. Raises nothing: the request is answered."""
        try:
            self._make_spans(record, answers, watch.stages())
        except Exception:
            log.exception("trace_failed")

    def _make_spans(self, record: Record, answers: Sequence[OutgoingRecord], stages: tuple[Stage, ...]) -> None:
        carrier = {name: value.decode("latin-1") for name, value in record.headers if name in _CARRIED and value}
        root = self._tracer.start_span(
            f"process {record.topic}",
            self._propagator.extract(carrier),
            SpanKind.CONSUMER,
            attributes=self._attributes_of(record),
            start_time=_nanoseconds(stages[0].began),
        )
        if root.is_recording():
            reply = _reply(answers)
            if reply is not None:
                root.set_attributes(_attributes_of_reply(reply))
            if (code := _error_of(reply)) is not None:
                root.set_attribute("error.type", code)
                root.set_status(Status(StatusCode.ERROR, code))
            for stage in stages:
                self._child(root, stage, SpanKind.PRODUCER if stage.name == "publish" else SpanKind.INTERNAL)
            for load in self._loads_of(reply, stages):
                between = {"loramux.tier.from": SOURCES[load.name], "loramux.tier.to": load.name}
                self._child(root, load._replace(name="adapter.load"), attributes=between)
        root.end(_nanoseconds(stages[-1].ended))

    async def close(self) -> None:
        """Send what is there, and stop."""
        await asyncio.to_thread(self._provider.shutdown)

    def _child(
        self,
        parent: Span,
        stage: Stage,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> None:
        context = trace.set_span_in_context(parent)
        span = self._tracer.start_span(stage.name, context, kind, attributes, start_time=_nanoseconds(stage.began))
        span.end(_nanoseconds(stage.ended))

    def _loads_of(self, reply: Reply | None, stages: Sequence[Stage]) -> Iterator[Stage]:
        """The loads of the request's adapter between its being taken and its answer."""
        if reply is None or reply.adapter_id is None or reply.revision is None:
            return
        taken, answered = stages[0].ended, stages[-1].began
        for load in self._loads.get((reply.adapter_id, reply.revision), ()):
            if load.ended >= taken and load.began <= answered:
                yield load

    def _attributes_of(self, record: Record) -> dict[str, AttributeValue]:
        return {
            "messaging.system": "kafka",
            "messaging.operation.type": "process",
            "messaging.destination.name": record.topic,
            "messaging.destination.partition.id": str(record.partition),
            "messaging.kafka.offset": record.offset,
            "messaging.consumer.group.name": self._group_id,
        }


def _reply(answers: Sequence[OutgoingRecord]) -> Reply | None:
    """The reply among the answers, None where there is a dead letter."""
    if len(answers) != 1 or answers[0].value is None:
        return None
    try:
        return Reply.from_json(answers[0].value)
    except ValueError:
        return None


def _error_of(reply: Reply | None) -> str | None:
    if reply is None:
        return "dead_letter"
    return None if reply.error is None else reply.error.code.value


def _attributes_of_reply(reply: Reply) -> dict[str, AttributeValue]:
    said: dict[str, AttributeValue | None] = {
        "loramux.request_id": reply.request_id,
        "loramux.adapter_id": reply.adapter_id,
        "loramux.revision": reply.revision,
        "gen_ai.response.finish_reasons": None if reply.finish_reason is None else [str(reply.finish_reason)],
        "gen_ai.usage.input_tokens": None if reply.usage is None else reply.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": None if reply.usage is None else reply.usage.completion_tokens,
    }
    return {name: value for name, value in said.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
