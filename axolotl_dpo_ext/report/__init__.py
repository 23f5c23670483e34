"""The run report: one self-contained HTML file, and beside it the JSON from which it can be made again."""

from __future__ import annotations

from axolotl_dpo_ext.report.document import HTML_NAME, JSON_NAME, RunReport
from axolotl_dpo_ext.report.headline import headline
from axolotl_dpo_ext.report.training import training_section

__all__ = ["HTML_NAME", "JSON_NAME", "RunReport", "headline", "training_section"]
