"""The audit of an Axolotl configuration without its training: what ``dpo-audit CONFIG`` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import PluginManager

from axolotl_dpo_ext.axolotl_config import for_one_process, validated
from axolotl_dpo_ext.plugin import DPOExtPlugin
from axolotl_dpo_ext.upstream_errors import explained, in_datasets, in_validation

if TYPE_CHECKING:
    from axolotl_dpo_ext.quality import AuditResult


def audit_with_axolotl(keys: Mapping[str, Any], changes: Mapping[str, Any]) -> AuditResult:
    """Audits the pairs that a training run with this configuration would load, on any machine.

    Nothing of the run's ``output_dir`` is touched; what is kept beside the prepared dataset (Axolotl's own copy and the
    scores), the run will read.

    Args:
        keys: An Axolotl configuration as read from YAML. Without ``dpo_ext.quality`` the defaults are used.
        changes: Settings of ``dpo_ext.quality`` that differ.

    Raises:
        ConfigurationError: The configuration or its data cannot be used.
        QualityStop: Too little would be left.
    """
    from axolotl.utils.config import normalize_cfg_datasets, normalize_config

    given = for_one_process(keys, reference=None, quality={**_quality(keys), **changes})
    with explained(given, in_validation):
        cfg = validated(given)
        # As `load_cfg` goes on, which would also begin a new debug.log in the run's folder.
        normalize_config(cfg)
        normalize_cfg_datasets(cfg)
    plugin = next(each for each in PluginManager.get_instance().plugins.values() if isinstance(each, DPOExtPlugin))
    with explained(given, in_datasets):
        return plugin.audit(cfg)[1]


def _quality(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the quality settings of a configuration; those of a part that is on, off or absent are the defaults."""
    parts = keys.get("dpo_ext")
    quality = parts.get("quality") if isinstance(parts, Mapping) else None
    return quality if isinstance(quality, Mapping) else {}
