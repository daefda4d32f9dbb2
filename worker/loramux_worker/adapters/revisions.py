"""Revisions: the content digest of an adapter's files, and which revision a place in the store held last.

`RevisionIndex` is why a restarted worker need not download again: a digest is only known once the bytes are
here, so what the store said about the files (their fingerprint) is kept beside the digest that they turned
out to have.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loramux_worker.adapters.workspace import Workspace

REVISION_PREFIX = "sha256:"
HISTORY_LENGTH = 16

_REVISION = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileDigest:
    """One file of an adapter: its name, its size in bytes and the SHA-256 of its content in hexadecimal."""

    name: str
    size: int
    sha256: str


def revision_of(files: Iterable[FileDigest]) -> str:
    """`sha256:` and the digest over (name, size, sha256) of the files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0{file.size}\0{file.sha256}\n".encode())
    return REVISION_PREFIX + digest.hexdigest()


def is_revision(text: str) -> bool:
    """Whether this is the content digest of an adapter, as opposed to a tag or a branch."""
    return _REVISION.fullmatch(text) is not None


def digest_folder(folder: Path) -> tuple[FileDigest, ...]:
    """Reads and digests every file of a folder. Raises OSError."""
    return tuple(_digest_file(path) for path in sorted(folder.iterdir()))


def _digest_file(path: Path) -> FileDigest:
    with path.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256")
        return FileDigest(path.name, source.tell(), digest.hexdigest())


class KnownRevisions(msgspec.Struct, frozen=True):
    """What one place in the store has held: (fingerprint, revision) pairs, the newest first."""

    history: tuple[tuple[str, str], ...] = ()

    @property
    def current(self) -> str | None:
        """The revision that the place held when it was last read; None when it never was."""
        return self.history[0][1] if self.history else None

    def __contains__(self, revision: object) -> bool:
        return any(revision == known for _, known in self.history)

    def find(self, fingerprint: str) -> str | None:
        """The revision of the files with this fingerprint; None when they have never been read."""
        return next((revision for known, revision in self.history if known == fingerprint), None)

    def with_current(self, fingerprint: str, revision: str) -> KnownRevisions:
        """The same history with this pair in front."""
        pair = (fingerprint, revision)
        return KnownRevisions((pair, *(known for known in self.history if known != pair))[:HISTORY_LENGTH])


class RevisionIndex:
    """A folder with one small JSON file per place in the store (a URI): its `KnownRevisions`.

    Written atomically, so that several processes can share it; a file that cannot be read is as good as none.
    The folder must lie in the workspace's file system. Raises OSError when it cannot be made.
    """

    def __init__(self, folder: Path, workspace: Workspace) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._workspace = workspace
        self._decoder = msgspec.json.Decoder(KnownRevisions)

    def get(self, uri: str) -> KnownRevisions:
        """What is known about a place; empty when nothing is."""
        return self._read(self._path(uri))

    def put(self, uri: str, known: KnownRevisions) -> None:
        """Remembers it across restarts. Raises OSError."""
        unfinished = self._workspace.new_path()
        unfinished.write_bytes(msgspec.json.encode(known))
        os.replace(unfinished, self._path(uri))

    def forget(self, uri: str) -> None:
        """Removes what is known about a place. Raises OSError."""
        self._path(uri).unlink(missing_ok=True)

    def prune(self, kept: Container[str]) -> None:
        """Removes what speaks of none of the revisions in `kept`. Raises OSError."""
        for path in self._folder.glob("*.json"):
            if not any(revision in kept for _, revision in self._read(path).history):
                path.unlink(missing_ok=True)

    def _path(self, uri: str) -> Path:
        return self._folder / f"{hashlib.sha256(uri.encode()).hexdigest()}.json"

    def _read(self, path: Path) -> KnownRevisions:
        try:
            known = self._decoder.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError):
            return KnownRevisions()
        return known if all(is_revision(revision) for _, revision in known.history) else KnownRevisions()
