"""Every setting of a worker, once; `settings_sources` says where their values come from."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    PositiveInt,
    SecretStr,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    SettingsConfigDict,
)

from loramux_schemas import (
    CONTROL_TOPIC,
    DEAD_LETTERS_TOPIC,
    REPLIES_TOPIC,
    REQUESTS_TOPIC,
    STREAM_TOPIC,
    AdapterName,
    KafkaConnection,
)
from loramux_schemas.headers import TENANT
from loramux_worker.policy_file import read_policies
from loramux_worker.scheduler.policy import AdapterPolicy


def _split(value: Any) -> Any:
    """A list in a flag or a variable is separated by commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0}


def _seconds(value: Any) -> Any:
    """`30s`, `500ms`, `2m`, `1h` or a number of seconds."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError("say a duration as 500ms, 30s, 2m or 1h")
        return float(match[1]) * _UNITS[match[2]]
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def _of_kafka(name: str) -> Any:
    """A setting of KafkaConnection, which checks it, with the default and the words that it has there."""
    field = KafkaConnection.model_fields[name]
    return Field(field.default, description=field.description)


class WorkerSettings(BaseSettings):
    """Settings of `loramux worker`."""

    model_config = SettingsConfigDict(
        env_prefix="LORAMUX_",
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_prog_name="loramux worker",
        cli_exit_on_error=False,
        hide_input_in_errors=True,
    )

    model: str = Field(description="base model: a local folder in Hugging Face format, or a hub id")
    model_name: str | None = Field(
        None,
        description="what adapters call the base model, e.g. meta-llama/Llama-3.1-8B: those of another are refused",
    )
    adapter_uri: str | None = Field(
        None,
        description="where adapters are, e.g. s3://bucket/adapters/{adapter_id} or hf://org/{adapter_id}; "
        "none: only the base model",
    )
    adapters: Names = Field(
        default_factory=lambda: _split(os.environ.get("LORA_ADAPTERS", "")),
        validate_default=True,
        description="adapter ids to load at start, separated by commas (also LORA_ADAPTERS)",
    )
    merge_adapter: str | None = Field(
        None,
        description="one hot adapter, id or id@revision, to be merged into the base weights: it runs at the base "
        "model's speed, all others and the base model have it taken off again",
    )
    authorization_file: Path | None = Field(
        None, description="TOML file that says which tenant may use which adapters; none: everybody may use all"
    )
    tenant_header: str = Field(TENANT, min_length=1, description="Kafka header that names the tenant of a request")

    bootstrap_servers: str = _of_kafka("bootstrap_servers")
    security_protocol: str = _of_kafka("security_protocol")
    sasl_mechanism: str = _of_kafka("sasl_mechanism")
    sasl_username: str | None = _of_kafka("sasl_username")
    sasl_password: SecretStr | None = _of_kafka("sasl_password")
    sasl_oauthbearer_token_endpoint_url: str | None = _of_kafka("sasl_oauthbearer_token_endpoint_url")
    sasl_oauthbearer_client_id: str | None = _of_kafka("sasl_oauthbearer_client_id")
    sasl_oauthbearer_client_secret: SecretStr | None = _of_kafka("sasl_oauthbearer_client_secret")
    sasl_oauthbearer_scope: str | None = _of_kafka("sasl_oauthbearer_scope")
    sasl_aws_region: str | None = _of_kafka("sasl_aws_region")
    ssl_cafile: str | None = _of_kafka("ssl_cafile")
    ssl_certfile: str | None = _of_kafka("ssl_certfile")
    ssl_keyfile: str | None = _of_kafka("ssl_keyfile")
    group_id: str = Field("loramux", description="consumer group: the workers that share the load")
    requests_topic: str = Field(REQUESTS_TOPIC, description="where requests are read")
    replies_topic: str = Field(REPLIES_TOPIC, description="where replies go")
    stream_topic: str = Field(STREAM_TOPIC, description="where token deltas go")
    dead_letter_topic: str = Field(
        DEAD_LETTERS_TOPIC, description="where messages go that are no request or that engines die of"
    )
    control_topic: str = Field(CONTROL_TOPIC, description="where cancellations are read; every worker reads all of it")
    create_topics: bool = Field(False, description="create topics that are missing")
    reply_topics: Names = Field((), description="allowed reply_to topics, names or patterns (fnmatch), by commas")
    delivery: Literal["exactly_once", "at_least_once"] = Field(
        "exactly_once",
        description="exactly_once: in transactions, seen once by read_committed readers; "
        "at_least_once: a reply may come twice",
    )

    dedupe_window: Seconds = Field(
        600.0, description="how long a message that comes again is answered from the first; 0 runs each"
    )
    cancel_memory: Seconds = Field(
        600.0, description="how long a cancelled request_id is remembered, for requests that are not read yet"
    )

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: str = Field(
        "auto", pattern="^(auto|float32|float16|bfloat16)$", description="auto, float32, float16, bfloat16"
    )
    engines: PositiveInt | None = Field(None, description="engine processes; default one per GPU, 1 on a CPU")
    kv_cache_memory: ByteSize | None = Field(None, description="KV cache of each engine, bytes or 4GiB")
    adapter_memory: ByteSize | None = Field(None, description="adapters on the device, each engine, bytes or 4GiB")
    host_memory: ByteSize | None = Field(None, description="adapters in host memory, each engine, bytes or 4GiB")
    disk_cache: Path = Field(
        default_factory=lambda: Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loramux",
        description="folder of the adapters' disk tier",
    )
    disk_quota: ByteSize = Field(ByteSize(20 << 30), description="bytes that the disk tier may take")
    block_size: PositiveInt = Field(16, description="tokens of a KV block")
    max_model_len: PositiveInt | None = Field(None, description="longest prompt + reply in tokens; from the model")
    max_batched_tokens: PositiveInt | None = Field(
        None,
        le=32768,
        description="tokens of one step, longer prompts go in chunks; 2048, on a CPU 192 beside one of each sequence",
    )
    max_batch_sequences: PositiveInt = Field(256, le=32768, description="sequences of one step")
    max_batch_ranks: PositiveInt = Field(4096, description="sum of the distinct adapters' ranks of one step")
    locality: float = Field(
        0.0,
        ge=0,
        description="weighted tokens for which adapters that run may go before others: more throughput, longer waits",
    )
    residency_quantum: float = Field(
        8192.0,
        ge=0,
        description="weighted tokens by which others may go past an adapter that finds no room",
    )
    policy_file: Path | None = Field(
        None,
        description="TOML file with weights and limits by adapter: [[adapters]] pattern, weight, "
        "tokens_per_second, max_running",
    )
    max_lora_rank: PositiveInt = Field(256, description="largest rank that is accepted")
    cuda_graphs: bool = Field(
        True, description="on a GPU, run small steps as CUDA graphs; off starts sooner, runs slower"
    )
    look_ahead: PositiveInt = Field(1024, description="requests in hand: begun and not yet answered")
    adapter_look_ahead: float = Field(
        0.75, gt=0, lt=1, description="share of them that one adapter may have while it is alone; several share alike"
    )
    max_parked: PositiveInt = Field(
        8192, description="requests read beyond that, which wait until their adapter has room and hide nobody behind"
    )
    parked_memory: ByteSize = Field(ByteSize(64 << 20), gt=0, description="bytes that these may take, or 64MiB")

    http_host: str = Field("127.0.0.1", description="address of /metrics, /healthz and /readyz")
    http_port: int = Field(9400, ge=0, le=65535, description="their port; 0 picks a free one and logs it")
    drain_timeout: Seconds = Field(30.0, description="after SIGTERM, how long running requests may take to finish")
    session_timeout: Seconds = Field(45.0, description="silence after which the group gives a worker's work to others")
    startup_timeout: Seconds = Field(30.0, description="how long to wait for a broker at the start")
    revision_ttl: Seconds = Field(60.0, description="how soon a new revision of an adapter is looked for")
    adapter_timeout: Seconds = Field(30.0, description="how long an adapter may take to arrive")
    otlp_endpoint: str | None = Field(
        default_factory=lambda: os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
        validate_default=True,
        pattern="^https?://[^/]",
        description="OpenTelemetry collector for traces, OTLP over HTTP, e.g. http://localhost:4318 "
        "(also OTEL_EXPORTER_OTLP_ENDPOINT); none: no traces",
    )
    log_format: str = Field("text", pattern="^(text|json)$", description="text or json")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning, error")
    log_text: bool = Field(False, description="log prompts and answers too: for development, they are your users'")
    config: Path | None = Field(None, description="TOML file with any of these settings")

    @field_validator("model")
    @classmethod
    def _check_folder(cls, model: str) -> str:
        if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
            raise ValueError("there is no such folder")
        return model

    @field_validator("adapters")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            AdapterName.parse(name)
        return names

    @field_validator("merge_adapter")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        if name is not None:
            AdapterName.parse(name)
        return name

    @cached_property
    def policies(self) -> tuple[AdapterPolicy, ...]:
        """What `policy_file` gives each adapter."""
        return () if self.policy_file is None else read_policies(self.policy_file)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no log may show: settings that are secret, and the passwords in addresses."""
        values = (getattr(self, name) for name in type(self).model_fields)
        secret = (value.get_secret_value() for value in values if isinstance(value, SecretStr))
        addresses = (urlsplit(address) for address in (self.adapter_uri, self.otlp_endpoint) if address)
        return (*secret, *(parts.password for parts in addresses if parts.password))

    @property
    def connection(self) -> KafkaConnection:
        """How to reach the brokers."""
        said = {name: getattr(self, name) for name in KafkaConnection.settings()}
        return KafkaConnection(**{name: value for name, value in said.items() if value is not None})
