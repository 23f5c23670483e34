"""Loads the built-ins and third parties behind the hooks of ``hookspecs.py``, and isolates broken ones.

A third party is any installed package with an entry point in the group ``axolotl_dpo_ext``. One that
fails to import, raises in a hook, or offers a name that is already taken is reported by name and left
out; the rest go on. With ``AXOLOTL_DPO_EXT_STRICT_PLUGINS=1`` its failure stops the run.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pluggy

from axolotl_dpo_ext import hookspecs
from axolotl_dpo_ext.vocabulary import RunStopped

if TYPE_CHECKING:
    from axolotl_dpo_ext.hardware import HardwarePreset
    from axolotl_dpo_ext.quality import Check, Embedder
    from axolotl_dpo_ext.reference import ReferenceStrategy

LOG = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "axolotl_dpo_ext"
RESERVED = "auto"  # lets the pack choose
STRICT_VARIABLE = "AXOLOTL_DPO_EXT_STRICT_PLUGINS"


class ThirdPartyError(RunStopped, RuntimeError):
    """A third-party plugin failed and ``AXOLOTL_DPO_EXT_STRICT_PLUGINS`` makes that fatal."""


class Named(Protocol):
    """Whatever a hook returns: a thing with a name that users write in their YAML."""

    @property
    def name(self) -> str:
        """The name users write."""
        ...


T = TypeVar("T", bound=Named)


@dataclass
class Extensions:
    """What the built-ins and the third parties provide, by name.

    Attributes:
        reference_strategies: Strategies behind ``dpo_ext: {reference: …}``.
        pair_checks: Checks behind ``dpo_ext: {quality: …}``, in the order in which they run.
        embedders: Encoders behind ``dpo_ext: {quality: {embedder: …}}``.
        hardware_presets: Presets behind ``dpo_ext: {hardware: …}``.
        origins: For each third party that was loaded, its entry-point name and distribution.
        failures: For each third party that was left out, its name and what went wrong.
    """

    reference_strategies: dict[str, ReferenceStrategy] = field(default_factory=dict)
    pair_checks: dict[str, Check] = field(default_factory=dict)
    embedders: dict[str, Embedder] = field(default_factory=dict)
    hardware_presets: dict[str, HardwarePreset] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@functools.cache
def extensions() -> Extensions:
    """Returns everything registered, loading it at the first call.

    Raises:
        ThirdPartyError: A third party failed and ``AXOLOTL_DPO_EXT_STRICT_PLUGINS`` is set.
    """
    # The rooms' built-ins are imported here, not at the top: importing this module stays cheap.
    from axolotl_dpo_ext.hardware import builtins as hardware
    from axolotl_dpo_ext.quality import builtins as quality
    from axolotl_dpo_ext.reference import builtins as reference

    loaded = Extensions()
    for room in (reference, quality, hardware):
        _collect(loaded, room)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        version = f" {point.dist.version}" if point.dist else ""
        origin = f"{point.dist.name if point.dist else point.value}{version}"
        try:
            _collect(loaded, point.load())
        except (Exception, SystemExit) as error:  # a plugin must not end the run either
            _report_failure(loaded, f"{point.name} ({origin})", error)
        else:
            loaded.origins[point.name] = origin
    return loaded


def _collect(loaded: Extensions, plugin: object) -> None:
    """Adds what one plugin provides: all of it, or, if any hook raises or a name is taken, none of it."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    manager.check_pending()
    kinds = _kinds()
    provided = {
        room: _by_name(room, kind, _flatten(getattr(manager.hook, room)()), getattr(loaded, room))
        for room, kind in kinds.items()
    }
    for room, things in provided.items():
        getattr(loaded, room).update(things)


def _kinds() -> dict[str, type]:
    """Returns, for each hook, the class whose instances it returns."""
    from axolotl_dpo_ext.hardware import HardwarePreset
    from axolotl_dpo_ext.quality import Check, Embedder
    from axolotl_dpo_ext.reference import ReferenceStrategy

    return {
        "reference_strategies": ReferenceStrategy,
        "pair_checks": Check,
        "embedders": Embedder,
        "hardware_presets": HardwarePreset,
    }


def _flatten(results: Iterable[Iterable[T]]) -> list[T]:
    return [thing for result in results for thing in result]


def _by_name(room: str, kind: type, things: Iterable[T], taken: dict[str, Any]) -> dict[str, T]:
    named: dict[str, T] = {}
    for thing in things:
        if not isinstance(thing, kind):
            raise TypeError(f"{room} returned {thing!r}, which is not an instance of {kind.__name__}")
        for attribute in ("name", "summary") if kind.__name__ != "Embedder" else ("name",):
            if not isinstance(value := getattr(thing, attribute, None), str) or not (value or attribute == "summary"):
                raise TypeError(f"{room}: {type(thing).__qualname__}.{attribute} is {value!r}, not a text")
        if thing.name in taken or thing.name in named or thing.name == RESERVED:
            raise ValueError(
                f"{room}: the name {thing.name!r} of {type(thing).__module__}.{type(thing).__qualname__} is already "
                f"taken; a name in a YAML must mean one thing: choose another"
            )
        named[thing.name] = thing
    return named


def _report_failure(loaded: Extensions, name: str, error: BaseException) -> None:
    message = f"{type(error).__name__}: {error}"
    if os.environ.get(STRICT_VARIABLE, "") not in ("", "0"):
        raise ThirdPartyError(
            f"the third-party plugin {name} failed: {message}\n"
            f"    why it stops the run: {STRICT_VARIABLE} is set\n"
            f"    fix: mend or uninstall the plugin, or unset the variable to go on without it"
        ) from error
    LOG.warning("the third-party plugin %s is left out: %s (set %s=1 to stop instead)", name, message, STRICT_VARIABLE)
    loaded.failures[name] = message
