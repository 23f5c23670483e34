"""JSON files that others wrote, and that may be absent or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file, or ``None`` where there is no such file or no object in it.

    Args:
        path: The file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
