"""Plain `transformers.TrainerCallback`s for preference tuning with TRL.

They need transformers and nothing of this distribution but themselves, so that they serve a TRL script as
well as an Axolotl run. Names are loaded on first use: importing the package alone imports neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_callbacks.preference_log import PreferenceLogCallback as PreferenceLogCallback

_HOME = {"PreferenceLogCallback": "trl_callbacks.preference_log"}

__all__ = ["PreferenceLogCallback"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
