"""The installed versions, and the ones this pack is tested with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# The combinations that CI runs; see constraints/. ``None``: the stack does without that package.
TESTED: dict[str, dict[str, str | None]] = {
    "A": {
        "axolotl": "0.19.0",
        "trl": "1.9.0",
        "transformers": "5.16.1",
        "peft": "0.20.0",
        "datasets": "4.8.4",
    },
    "B": {
        "axolotl": "0.21.0",
        "trl": "1.14.1",
        "transformers": "5.20.1",
        "peft": "0.21.2",
        "datasets": "5.0.1",
    },
    "C": {
        "axolotl": None,
        "trl": "1.16.0",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "datasets": "5.2.0",
    },
}
SHOWN = ("axolotl", "trl", "transformers", "peft", "datasets", "accelerate", "torch", "deepspeed")


def installed_versions() -> dict[str, Version | None]:
    """Returns the installed version of each package of the stack, ``None`` where it is not installed.

    Reads the packages' metadata only: nothing is imported.
    """
    return {name: _installed(name) for name in SHOWN}


def _installed(name: str) -> Version | None:
    try:
        return Version(version(name))
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class StackMatch:
    """How the installed versions compare with the tested ones.

    Attributes:
        nearest: Name of the tested stack that agrees in most packages.
        differences: For each package that differs, what is installed and what was tested.
    """

    nearest: str
    differences: Mapping[str, tuple[str, str]]

    def __str__(self) -> str:
        """Returns one line for the terminal."""
        if not self.differences:
            return f"tested (stack {self.nearest})"
        listed = ", ".join(f"{name} {found} (tested: {tested})" for name, (found, tested) in self.differences.items())
        return f"not a tested combination; nearest is stack {self.nearest}, which differs in {listed}"


def match_stack(installed: Mapping[str, Version | None]) -> StackMatch:
    """Finds the tested stack nearest to the installed versions.

    Args:
        installed: Versions by package name, as ``installed_versions`` returns them.
    """
    matches = [
        StackMatch(
            name,
            {
                p: (_text(installed.get(p)), v or "none")
                for p, v in stack.items()
                if _text(installed.get(p)) != (v or "none")
            },
        )
        for name, stack in TESTED.items()
    ]
    return min(matches, key=lambda match: len(match.differences))


def _text(found: Version | None) -> str:
    return found.public if found else "none"
