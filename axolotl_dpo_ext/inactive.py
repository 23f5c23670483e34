"""What stands in for the plugin when it can't be imported."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

LOG = logging.getLogger(__name__)


class PluginNotActiveError(RuntimeError):
    """A run asks for ``dpo_ext:`` and the plugin could not be activated."""


def stand_in(error: Exception) -> type:
    """Makes a plugin class whose only act is to stop the runs that have a ``dpo_ext:`` key.

    Args:
        error: Why the real plugin could not be imported.

    Returns:
        A subclass of Axolotl's ``BasePlugin``.
    """
    from axolotl.integrations.base import BasePlugin

    class InactiveDPOExtPlugin(BasePlugin):  # type: ignore[misc] # axolotl ships no types
        def register(self, cfg: Mapping[str, Any]) -> None:
            if cfg.get("dpo_ext") is None or cfg["dpo_ext"] is False:
                LOG.warning("axolotl-dpo-ext could not be loaded (%s); this run does not ask for it", error)
                return
            raise PluginNotActiveError(
                f"axolotl-dpo-ext could not be activated: {type(error).__name__}: {error}\n"
                "    why it stops the run: the configuration has a `dpo_ext:` key, and training without what it asks "
                "for would go unnoticed\n"
                "    fix: reinstall with `pip install --force-reinstall --no-deps axolotl-dpo-ext`, check the versions "
                "with `python -m axolotl_dpo_ext doctor`, or remove the key"
            ) from error

    return InactiveDPOExtPlugin
