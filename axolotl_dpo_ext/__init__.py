"""axolotl-dpo-ext: an extension pack for preference tuning with Axolotl and TRL.

Importing this package costs next to nothing; its names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_dpo_ext.hookspecs import hookimpl
    from axolotl_dpo_ext.plugin import DPOExtPlugin

    __version__: str

__all__ = ["DPOExtPlugin", "__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("axolotl-dpo-ext")
    if name == "hookimpl":
        return importlib.import_module("axolotl_dpo_ext.hookspecs").hookimpl
    if name == "DPOExtPlugin":
        return _plugin_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _plugin_class() -> Any:
    """Returns the plugin, or, if it can't be imported, a stand-in that stops the runs that ask for it.

    Axolotl 0.19 only logs a plugin that fails to import, and 0.21 skips one that it discovered; either
    would train without what the ``dpo_ext:`` key asks for. Runs without the key are left alone.
    """
    importlib.import_module("axolotl_dpo_ext.extras").require("axolotl", "axolotl", "the Axolotl plugin")
    try:
        return importlib.import_module("axolotl_dpo_ext.plugin").DPOExtPlugin
    except Exception as error:
        return importlib.import_module("axolotl_dpo_ext.inactive").stand_in(error)
