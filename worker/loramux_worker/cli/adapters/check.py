"""`loramux adapters check`: would a worker serve this adapter, and what does it touch?"""

from __future__ import annotations

import math
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_worker.cli.adapters.options import (
    AdapterUri,
    ConfigFile,
    Model,
    ModelName,
    Timeout,
    quiet_logs,
    worker_settings,
)
from loramux_worker.errors import RequestFailed

if TYPE_CHECKING:
    from loramux_worker.adapters.adapter_plan import AdapterLimits
    from loramux_worker.cli.adapters.report import BroughtText, Report
    from loramux_worker.cli.adapters.sources import LocalAdapter
    from loramux_worker.model.skeleton import ModelSkeleton


class Dtype(StrEnum):
    """What a worker casts adapters to."""

    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def check(
    adapters: Annotated[list[str], typer.Argument(metavar="ID_OR_PATH…", help="Folders, or ids in --adapter-uri.")],
    model: Model = None,
    adapter_uri: AdapterUri = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank that is accepted; 256 if not set.")
    ] = None,
    model_name: ModelName = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="What the worker serves in; auto: the model's own, as on a GPU.")
    ] = None,
    timeout: Timeout = 600.0,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document in place of tables.")] = False,
) -> None:
    """Check adapters against a base model: all that a worker checks, without a GPU and without the model's weights.

    Shows what each adapter touches and what it takes in the gpu pool, and
    what it brings of text; or why a worker would refuse it. Of the model
    only the config is read, the embedding when an adapter brings a copy of
    it, and the tokenizer when an adapter brings its own text.

    Exit code: 0 when a worker would serve all, 1 when it would refuse one,
    2 for a wrong option.

    Examples:

    loramux adapters check ./pirate ./spanish --model /models/Llama-3.1-8B

    loramux adapters check acme/pirate --model /models/Llama-3.1-8B
    --adapter-uri 's3://bucket/adapters/{adapter_id}'
    """
    settings = worker_settings(
        model=model,
        adapter_uri=adapter_uri,
        max_lora_rank=max_lora_rank,
        model_name=model_name,
        dtype=None if dtype is None else dtype.value,
        config=config,
    )
    quiet_logs()

    from loramux_worker.adapters.adapter_plan import AdapterLimits
    from loramux_worker.cli.adapters.sources import check_source, local_adapter
    from loramux_worker.cli.adapters.terminal import byte_progress

    for adapter in adapters:
        check_source(adapter, settings.adapter_uri)

    from loramux_worker.model.skeleton import ModelSkeleton

    device = "cpu" if settings.device == "cpu" else "cuda"
    skeleton = ModelSkeleton(settings.model, dtype=settings.dtype, device=device)
    limits = AdapterLimits(
        max_rank=settings.max_lora_rank,
        dtype=skeleton.dtype,
        base_model_name=settings.model_name or skeleton.name,
        base_weights=skeleton.base_weights,
        parameters=skeleton.parameters,
        replaceable=skeleton.replaceable,
    )
    reports = []
    with byte_progress("") as progress:
        for adapter in adapters:
            progress.describe(adapter)
            try:
                with local_adapter(adapter, settings.adapter_uri, timeout, progress) as local:
                    reports.append(_examine(local, skeleton, limits))
            except RequestFailed as failure:
                reports.append(_refusal(adapter, failure))
    _print(reports, skeleton, as_json)
    if not all(report.is_served for report in reports):
        raise typer.Exit(1)


def _examine(local: LocalAdapter, skeleton: ModelSkeleton, limits: AdapterLimits) -> Report:
    """Read the whole adapter as a worker would. Raises RequestFailed."""
    from loramux_worker.adapters.adapter_plan import AdapterPlans
    from loramux_worker.adapters.host_memory import allocate
    from loramux_worker.adapters.layout import AdapterLayout
    from loramux_worker.adapters.peft_format import AdapterFiles
    from loramux_worker.cli.adapters.report import Report, TouchedModule

    with AdapterFiles(local.folder, AdapterPlans(skeleton.targets, limits)) as files:
        layout, config = files.layout, files.config
        files.read_into(allocate(layout.num_elements, limits.dtype, pin=False))
        modules = []
        for module, scaling in zip(layout.modules, files.scalings, strict=True):
            alone = AdapterLayout.plan([(module.target, module.rank)], skeleton.targets)
            alpha = scaling * (math.sqrt(module.rank) if config.use_rslora else module.rank)
            modules.append(
                TouchedModule(
                    skeleton.targets[module.target].name,
                    module.rank,
                    float(f"{alpha:.12g}"),  # the root's last digits left out
                    scaling,
                    alone.num_elements * limits.dtype.itemsize,
                )
            )
    num_bytes = layout.num_elements * limits.dtype.itemsize
    own = Counter(f"{tensor.module.rpartition('.')[2]}.{tensor.parameter}" for tensor in layout.own)
    text = _text(local, skeleton)
    return Report(local.name, local.revision, tuple(modules), layout.rank, num_bytes, text, tuple(own.items()))


def _text(local: LocalAdapter, skeleton: ModelSkeleton) -> BroughtText | None:
    """What it brings beside its weights, None if nothing. Raises RequestFailed, and ConfigurationError."""
    from loramux_worker.cli.adapters.report import BroughtText
    from loramux_worker.text.adapter_text import AdapterText
    from loramux_worker.text.tokenizer import Tokenizer

    text, model = AdapterText(local.folder), str(skeleton.folder)
    if not text.files:
        return None
    base = Tokenizer.load(model)
    return BroughtText.of(tuple(sorted(text.files)), text.tokenizer(base, model), base)


def _refusal(adapter: str, failure: RequestFailed) -> Report:
    from loramux_worker.cli.adapters.report import Report
    from loramux_worker.cli.adapters.sources import reason_of

    return Report(adapter, code=failure.code.value, reason=reason_of(failure))


def _print(reports: list[Report], skeleton: ModelSkeleton, as_json: bool) -> None:
    dtype = str(skeleton.dtype).removeprefix("torch.")
    if as_json:
        import orjson

        document = {
            "model": skeleton.name,
            "dtype": dtype,
            "adapters": [report.as_json() for report in reports],
        }
        typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2))
        return

    from rich.console import Console

    console = Console()
    for report in reports:
        if report.is_served:
            typer.echo(report.name if report.revision is None else f"{report.name}  {report.revision}")
            console.print(report.as_table(dtype))
            if report.own:
                own = ", ".join(f"{kind} × {count}" for kind, count in report.own)
                console.print(f"beside LoRA: {own}", markup=False, highlight=False, soft_wrap=True)
            if report.text is not None:
                console.print(report.text.as_lines(), markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(f"refused: {report.name}: {report.reason} ({report.code})")
