"""Checks of preference pairs before training, and a held-out split that does not leak prompts.

Importing this room is cheap: datasets and scipy are imported when an audit runs.
"""

from __future__ import annotations

from axolotl_dpo_ext.quality.audit import audit, settings_problems
from axolotl_dpo_ext.quality.base import Check, Embedder, PairBatch, PairCheck, Scores, SetCheck
from axolotl_dpo_ext.quality.likelihood import likelihood_section
from axolotl_dpo_ext.quality.page import checks_data
from axolotl_dpo_ext.quality.records import RECORDS_FILE
from axolotl_dpo_ext.quality.result import AuditResult, QualityStop

__all__ = [
    "RECORDS_FILE",
    "AuditResult",
    "Check",
    "Embedder",
    "PairBatch",
    "PairCheck",
    "QualityStop",
    "Scores",
    "SetCheck",
    "audit",
    "checks_data",
    "likelihood_section",
    "settings_problems",
]
