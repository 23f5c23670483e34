"""Optional dependencies: what is missing, and the line that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class MissingExtraError(ImportError):
    """A feature needs a package that is not installed; the message is the line that installs it."""


def install_line(extra: str) -> str:
    """Returns the command that installs one of this pack's extras, such as ``deepspeed``."""
    return f"pip install 'axolotl-dpo-ext[{extra}]'"


def is_installed(module: str) -> bool:
    """Tells whether a module of an optional dependency is there, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports a module of an optional dependency.

    Args:
        module: Name of the module.
        extra: The extra of this pack that brings it.
        purpose: What it is needed for, as the subject of a sentence.

    Raises:
        MissingExtraError: The package is not installed. A package that is there and fails to import raises
            its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {module}, which is not installed: {install_line(extra)}",
            name=module,
        ) from None
