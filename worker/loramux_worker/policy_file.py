"""The file of `--policy-file`: what each adapter may have.

[[adapters]]                 # the first whose pattern matches holds; others have weight 1 and no limits
pattern = "acme/*"           # fnmatch; `base` alone is the base model
weight = 4.0                 # of the service, while others wait too
tokens_per_second = 2000.0   # prompt and generated, of one engine; what is beyond waits
max_running = 32             # requests at the same time, of one engine; what is beyond waits
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from loramux_worker.errors import ConfigurationError
from loramux_worker.scheduler.policy import AdapterPolicy


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    adapters: tuple[AdapterPolicy, ...] = ()


def read_policies(path: Path) -> tuple[AdapterPolicy, ...]:
    """The policies of a file.

    Raises:
        ConfigurationError: one line that says what is wrong with it.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=PolicyFile).adapters
    except OSError as error:
        raise ConfigurationError(f"--policy-file {path}: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError) as error:  # not TOML, not UTF-8, or not what it should hold
        raise ConfigurationError(f"--policy-file {path}: {' '.join(str(error).split())}") from None
