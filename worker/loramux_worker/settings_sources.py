"""Where settings come from: flags > environment `LORAMUX_*` > a TOML file (`--config`) > defaults.

What a person set wrongly is one line that names the setting, and never shows a secret.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
    TomlConfigSettingsSource,
)

from loramux_worker.errors import ConfigurationError
from loramux_worker.settings import WorkerSettings


def load_settings(arguments: list[str]) -> WorkerSettings:
    """Settings from the command line, the environment and the file that `--config` or LORAMUX_CONFIG names.

    Raises:
        ConfigurationError: one line that names the setting.
        SystemExit: after `--help`.
    """
    file = _config_file(arguments)

    class Sourced(WorkerSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            flags = CliSettingsSource[Any](WorkerSettings, cli_parse_args=arguments)
            toml = () if file is None else (TomlConfigSettingsSource(settings_cls, file),)
            return (flags, env_settings, *toml)

    try:
        settings = Sourced()
        settings.connection.client_options()  # what contradicts itself is told now, not when a broker is asked
        settings.policies  # noqa: B018 - likewise what is wrong with the file
        return settings
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None
    except SettingsError as error:
        raise ConfigurationError(_without_values(str(error))) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"--config {file}: {error}") from None
    except ValueError as error:
        raise ConfigurationError(" ".join(str(error).split())) from None


def _config_file(arguments: list[str]) -> Path | None:
    named = os.environ.get("LORAMUX_CONFIG")
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            named = arguments[i + 1]
        elif argument.startswith("--config="):
            named = argument.partition("=")[2]
    if named is None:
        return None
    if not Path(named).is_file():
        raise ConfigurationError(f"--config {named}: there is no such file")
    return Path(named)


def _without_values(message: str) -> str:
    """argparse's complaint in one line; of flags that it does not know, their names: a value may be a secret."""
    complaint, known, arguments = " ".join(message.split()).partition("unrecognized arguments: ")
    flags = [word.partition("=")[0] for word in arguments.split() if word.startswith("-")]
    return f"{complaint}{known}{' '.join(flags)}"


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
    if first["type"] == "missing":
        return f"{name} is required (or LORAMUX_{name[2:].replace('-', '_').upper()})"
    if first["type"] == "extra_forbidden":
        return f"{name}: there is no such setting; see loramux worker --help"
    reason = first["msg"].removeprefix("Value error, ")
    is_secret = name.endswith(("password", "secret", "url"))  # of a URL, the part before its @
    shown = "" if is_secret or isinstance(first["input"], dict) else f" {first['input']!r}"
    return f"{name}{shown}: {reason}"
