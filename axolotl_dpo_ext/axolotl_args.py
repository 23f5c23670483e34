"""What Axolotl's schema learns of this pack; a module of its own, because Axolotl imports it by name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class DPOExtArgs(BaseModel):
    """The one key this pack adds to an Axolotl configuration; ``configure`` reads what stands under it."""

    dpo_ext: Any = Field(default=None, description="Settings of axolotl-dpo-ext.")
