"""Writes requirements.txt and tools.txt beside this file: `make lock`.

One lock for every platform and Python that loramux supports, each file by its hash. What is locked stays at its version
unless `--upgrade` is given.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPILE = ["pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-header"]


def main() -> None:
    """Compiles both files with the uv of PATH, or of a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        uv = shutil.which("uv") or _fetched(Path(folder))
        for source, extras, lock in (
            ("pyproject.toml", ["--extra", "worker"], "requirements.txt"),
            ("deploy/image/tools.in", [], "tools.txt"),
        ):
            # Relative names, from the root: they are written into the lock.
            command = [uv, *COMPILE, *extras, *sys.argv[1:], source, "-o", f"deploy/image/{lock}"]
            subprocess.run(command, cwd=HERE.parents[1], check=True)
            print(f"lock: {HERE / lock}")


def _fetched(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    return str(folder / "bin" / "uv")


if __name__ == "__main__":
    main()
