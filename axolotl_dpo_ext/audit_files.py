"""What an audit leaves in a folder: the rows of each part, a record of each flagged row, and the page of the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from axolotl_dpo_ext.quality import AuditResult

_PARTS = ("train", "heldout", "dropped")


def names_in(folder: Path) -> list[Path]:
    """Returns every path that ``write_audit`` may write or remove in a folder."""
    from axolotl_dpo_ext.quality import RECORDS_FILE
    from axolotl_dpo_ext.report import HTML_NAME, JSON_NAME

    return [*(_rows_of(folder, part) for part in _PARTS), *(folder / n for n in (RECORDS_FILE, HTML_NAME, JSON_NAME))]


def write_audit(audited: AuditResult, folder: Path, title: str, with_records: bool) -> dict[str, int | None]:
    """Writes the rows, the records and the report of an audit; each file is replaced in one step.

    What has no file of this audit has none at all: rows that an earlier audit held out there may be trained on now.

    Args:
        audited: The audit.
        folder: Where to; it is made if need be.
        title: The report's title.
        with_records: Whether to write the records too.

    Returns:
        The rows of each file written, by path; ``None`` for the report.

    Raises:
        OSError: The folder cannot be written to.
    """
    from axolotl_dpo_ext.quality import RECORDS_FILE
    from axolotl_dpo_ext.quality.files import write_rows
    from axolotl_dpo_ext.report import RunReport

    written: dict[str, int | None] = {}
    for part in _PARTS:
        rows, path = getattr(audited, part), _rows_of(folder, part)
        if rows is None or not len(rows):
            path.unlink(missing_ok=True)
            continue
        write_rows(rows, path)
        written[str(path)] = len(rows)
    if with_records:
        written[str(folder / RECORDS_FILE)] = write_records(audited, folder / RECORDS_FILE)
    else:
        (folder / RECORDS_FILE).unlink(missing_ok=True)
    config = {"dpo_ext": {"quality": audited.settings.model_dump()}}
    report = RunReport(folder, title, config, sections=[audited.section()])
    return {**written, str(report.save()): None, str(report.write_html()): None}


def write_records(audited: AuditResult, path: Path) -> int:
    """Writes the records and returns how many there are."""
    audited.write_records(path)
    return sum(audited.counts.values())


def _rows_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.jsonl"
