"""Local preference files: read as one dataset with what is wrong in them, and written again."""

from __future__ import annotations

from axolotl_dpo_ext.quality.files.open import unreadable_rows
from axolotl_dpo_ext.quality.files.read import PreferenceFiles, read_files
from axolotl_dpo_ext.quality.files.write import write_rows

__all__ = ["PreferenceFiles", "read_files", "unreadable_rows", "write_rows"]
