"""Lists what is in the image and under which licence it comes, in licences.txt beside this file: `make lock`.

Read off the packages as they are installed in this environment, on the image's platform (Linux).
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

LOCK = Path(__file__).with_name("requirements.txt")
LIST = Path(__file__).with_name("licences.txt")


def listed() -> dict[str, str]:
    """Name → licence of the locked packages that are installed here."""
    names = sorted(set(re.findall(r"^([a-z0-9-]+)==", LOCK.read_text(), re.MULTILINE)))
    licences = {}
    for name in names:
        try:
            said = metadata(name)
        except PackageNotFoundError:
            continue  # for another platform
        classifiers = [each for each in said.get_all("Classifier", []) if each.startswith("License")]
        licences[name] = (
            said.get("License-Expression")
            or " OR ".join(each.rpartition(" :: ")[2] for each in classifiers)
            or (said.get("License") or "not said").partition("\n")[0]
        )
    return licences


def main() -> None:
    """Writes the list."""
    LIST.write_text("".join(f"{name}: {licence}\n" for name, licence in listed().items()))
    print(f"licences: {LIST}")


if __name__ == "__main__":
    main()
