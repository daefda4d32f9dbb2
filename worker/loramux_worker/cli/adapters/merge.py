"""`loramux adapters merge`: one adapter and the base model, made one model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
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
from loramux_worker.errors import ConfigurationError, RequestFailed

if TYPE_CHECKING:
    from loramux_worker.adapters.peft_format import AdapterWeights
    from loramux_worker.cli.adapters.sources import LocalAdapter
    from loramux_worker.model.skeleton import ModelSkeleton
    from loramux_worker.text.merged_text import MergedText

_NO_RANK_LIMIT = 1 << 31


class Dtype(StrEnum):
    """What the merged model is stored in."""

    SAME = "same"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ID_OR_PATH", help="A folder, or an id in --adapter-uri.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged model goes: a new folder.")],
    model: Model = None,
    dtype: Annotated[Dtype, typer.Option(help="What to store; same: each tensor as in the base model.")] = Dtype.SAME,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    adapter_uri: AdapterUri = None,
    model_name: ModelName = None,
    timeout: Timeout = 600.0,
    config: ConfigFile = None,
) -> None:
    """Bake one adapter into a copy of the base model, for a deployment of its own.

    The copy has the base model's files, in Hugging Face format: weights,
    config, tokenizer. Each weight that the adapter touches becomes
    W + scaling x B x A, computed in float32. The adapter's own tokenizer,
    chat template and generation config take the place of the model's.
    Memory holds the adapter and a few rows of the model at a time. The
    folder appears when it is complete, not before; Ctrl-C leaves nothing
    behind.

    Example: loramux adapters merge ./pirate --model /models/Llama-3.1-8B
    --out /models/pirate-8B
    """
    settings = worker_settings(model=model, adapter_uri=adapter_uri, model_name=model_name, config=config)
    quiet_logs()

    import torch

    from loramux_worker.cli.adapters.sources import check_source, local_adapter, reason_of
    from loramux_worker.cli.adapters.terminal import byte_progress, size_text

    check_source(adapter, settings.adapter_uri)
    _check_out(out, Path(settings.model).expanduser(), overwrite)

    from loramux_worker.model.merge import Merge
    from loramux_worker.model.skeleton import ModelSkeleton

    skeleton = ModelSkeleton(settings.model, dtype="float32")
    kind = None if dtype is Dtype.SAME else getattr(torch, dtype.value)
    try:
        with byte_progress(adapter) as progress:
            with local_adapter(adapter, settings.adapter_uri, timeout, progress) as local:
                weights = _read(local, skeleton, settings.model_name)
                text = _read_text(local, skeleton)
                revision = local.revision
            work = Merge(skeleton, weights, kind)
            _check_room(out, work.num_bytes)
            progress.expect(work.num_bytes)
            progress.describe(f"writing {out}")
            with _new_folder(out, overwrite) as folder:
                work.write(folder, progress.advance)
                if text is not None:
                    text.write(folder)
    except RequestFailed as failure:
        raise ConfigurationError(f"{adapter}: {reason_of(failure)}") from failure
    except OSError as error:
        raise ConfigurationError(f"--out {out}: {error.strerror or error}") from error
    name = adapter if revision is None else f"{adapter} ({revision})"
    typer.echo(f"{name} is in {work.num_changed} tensors of {out}, {size_text(work.num_bytes)}")


def _read(local: LocalAdapter, skeleton: ModelSkeleton, model_name: str | None) -> AdapterWeights:
    """The adapter in float32. Raises RequestFailed."""
    import torch

    from loramux_worker.adapters.adapter_plan import AdapterLimits
    from loramux_worker.adapters.peft_format import read_adapter

    name = model_name or skeleton.name
    own = skeleton.parameters, skeleton.replaceable
    limits = AdapterLimits(_NO_RANK_LIMIT, torch.float32, name, skeleton.base_weights, *own)
    return read_adapter(local.folder, skeleton.targets, limits)


def _read_text(local: LocalAdapter, skeleton: ModelSkeleton) -> MergedText | None:
    """The adapter's own text, None if it brings none. Raises RequestFailed."""
    from loramux_worker.text.adapter_text import AdapterText
    from loramux_worker.text.merged_text import MergedText

    text = AdapterText(local.folder)
    return MergedText(text, str(skeleton.folder)) if text.files else None


def _check_out(out: Path, model: Path, overwrite: bool) -> None:
    """Refuse a place that is taken, or that holds what is read. Raises ConfigurationError."""
    place, source = out.resolve(), model.resolve()
    if place == source or place in source.parents:
        raise ConfigurationError(f"--out {out}: the base model is there; name another folder")
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConfigurationError(f"--out {out}: is not empty; name another folder, or give --overwrite")


def _check_room(out: Path, num_bytes: int) -> None:
    from loramux_worker.cli.adapters.terminal import size_text

    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ConfigurationError(f"--out {out}: needs {size_text(num_bytes)}, the disk has {size_text(free)} left")


@contextmanager
def _new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place after the block, or is removed when the block fails.

    What a kill -9 leaves is removed by the next merge to the same place. Raises OSError.
    """
    from loramux_worker.adapters.workspace import Workspace

    out = out.absolute()
    parent = out.with_name(f".{out.name}.merging")
    workspace = Workspace(parent)
    try:
        folder = workspace.new_folder()
        yield folder
        old = workspace.new_path()
        if overwrite and out.exists():
            os.rename(out, old)
        try:
            os.rename(folder, out)
        except BaseException:
            if old.exists():
                os.rename(old, out)
            raise
    finally:
        workspace.close()
        with suppress(OSError):  # another merge to the same place may run
            parent.rmdir()
