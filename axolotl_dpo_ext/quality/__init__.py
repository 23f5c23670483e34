"""Checks of preference pairs before training, and a held-out split that does not leak prompts.

Importing this room is cheap: datasets and scikit-learn are imported when an audit runs.
"""

from __future__ import annotations

from axolotl_dpo_ext.quality.audit import audit, settings_problems
from axolotl_dpo_ext.quality.base import Embedder, PairBatch, PairCheck
from axolotl_dpo_ext.quality.result import AuditResult, QualityStop

__all__ = ["AuditResult", "Embedder", "PairBatch", "PairCheck", "QualityStop", "audit", "settings_problems"]
