"""Looks at an environment and a configuration without training: versions, plugin, settings, problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any

from packaging.version import Version

from axolotl_dpo_ext.configure import Configuration, configure
from axolotl_dpo_ext.plugins import Extensions
from axolotl_dpo_ext.stack import StackMatch, match_stack
from axolotl_dpo_ext.startup_guard import CLASS_PATH
from axolotl_dpo_ext.vocabulary import Problem, misspelt_key

PLUGIN_GROUP = "axolotl.plugins"


@dataclass
class Diagnosis:
    """What the doctor found.

    Attributes:
        versions: Installed versions by package name.
        stack: How they compare with the tested combinations.
        plugin: How the plugin is activated, in one line.
        third_parties: Third-party plugins that are loaded, with their distributions.
        failures: Third-party plugins that are left out, with what went wrong.
        configuration: The configuration's settings, decisions and problems; ``None`` without a configuration
            or without a ``dpo_ext:`` key in it.
        problems: Every problem, including those of the plugin's activation.
    """

    versions: Mapping[str, Version | None]
    stack: StackMatch
    plugin: str
    third_parties: Mapping[str, str]
    failures: Mapping[str, str]
    configuration: Configuration | None
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether nothing was found that must be mended."""
        return not any(problem.fatal for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Returns the diagnosis as JSON-serialisable values."""
        found = self.configuration
        return {
            "ok": self.ok,
            "versions": {name: str(version) if version else None for name, version in self.versions.items()},
            "stack": {"nearest": self.stack.nearest, "differences": dict(self.stack.differences)},
            "plugin": self.plugin,
            "third_parties": dict(self.third_parties),
            "failures": dict(self.failures),
            "settings": found.settings.model_dump() if found else None,
            "axolotl_keys": found.axolotl_keys if found else None,
            "decisions": [asdict(decision) for decision in found.decisions] if found else [],
            "problems": [asdict(problem) for problem in self.problems],
        }


def diagnose(
    config: Mapping[str, Any] | None, versions: Mapping[str, Version | None], registered: Extensions
) -> Diagnosis:
    """Examines an environment and, if given, a configuration.

    Args:
        config: An Axolotl configuration as read from YAML, or ``None`` to look at the environment only.
        versions: Installed versions by package name.
        registered: Strategies, checks, embedders and presets by name.
    """
    config = config or {}
    asked = config.get("dpo_ext") is not None and config["dpo_ext"] is not False
    configuration = configure(config, versions, registered) if asked else None
    plugin, problems = _activation(config, versions.get("axolotl"), asked)
    problems += [misspelt] if (misspelt := misspelt_key(config)) else []
    problems += configuration.problems if configuration else []
    problems += [
        Problem(
            setting=f"third-party plugin {name}",
            found=message,
            reason="it is left out, and so is whatever it provides",
            fix="mend, update or uninstall it",
            fatal=False,
        )
        for name, message in registered.failures.items()
    ]
    return Diagnosis(
        versions=versions,
        stack=match_stack(versions),
        plugin=plugin,
        third_parties=registered.origins,
        failures=registered.failures,
        configuration=configuration,
        problems=problems,
    )


def _activation(config: Mapping[str, Any], axolotl: Version | None, asked: bool) -> tuple[str, list[Problem]]:
    """Says how Axolotl will find the plugin, with a problem if the run asks for it and Axolotl won't."""
    plugins = config.get("plugins") or []
    if not isinstance(plugins, list):
        problem = Problem(
            setting="plugins",
            found=f"plugins: {plugins!r}",
            reason="Axolotl takes a list there",
            fix=f"write `plugins: [{CLASS_PATH}]`",
        )
        return "not active: `plugins` is not a list", [problem]
    listed = CLASS_PATH in plugins
    inert = "" if asked else "; without a `dpo_ext:` key it does nothing"
    if axolotl is None:
        return "Axolotl is not installed; use the pack from Python with TRL", []
    discovered = axolotl >= Version("0.20") and any(
        point.value == "axolotl_dpo_ext:DPOExtPlugin" for point in entry_points(group=PLUGIN_GROUP)
    )
    if discovered:
        return (
            f"active: discovered by Axolotl {axolotl}{' and listed in plugins' if listed else ''}{inert}",
            [],
        )
    if listed:
        return f"active: listed in plugins{inert}", []
    state = f"not active: Axolotl {axolotl} runs only plugins that the YAML lists"
    if not asked:
        return f"{state}{inert}", []
    problem = Problem(
        setting="plugins",
        found=f"plugins: {config.get('plugins') or '(not set)'}",
        reason=f"Axolotl {axolotl} would ignore the dpo_ext key",
        fix=f"add `plugins: [{CLASS_PATH}]`",
    )
    return state, [problem]
