"""The report of one run: what it consists of, and the two files it is written to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from axolotl_dpo_ext.report.encoding import (
    decision_from_json,
    plain,
    section_from_json,
    section_to_json,
    without_secrets,
)
from axolotl_dpo_ext.report.html import render
from axolotl_dpo_ext.report.training import is_training, training_section
from axolotl_dpo_ext.vocabulary import Decision, Section

JSON_NAME = "dpo_report.json"
HTML_NAME = "dpo_report.html"
LOG_NAME = "preference_log.jsonl"  # as trl_callbacks.PreferenceLogCallback writes it
SCHEMA_VERSION = 1  # raised where an older reader would misread a file, not for a part that it would only not show


@dataclass
class RunReport:
    """What a run was asked to do, what was decided for it, and what came of it.

    Everything is brought to plain JSON values on the way in (see `report.encoding.plain`), and secrets in the
    configuration are replaced, so that a report in memory equals the one read back from its file.

    Attributes:
        output_dir: The run's folder, where both files are written.
        title: Heading of the page.
        config: The effective configuration.
        decisions: What the pack chose for the user, with reasons.
        sections: What the rooms and the training have to say, in the order in which it is shown.
    """

    output_dir: Path
    title: str
    config: dict[str, Any] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.config = without_secrets(plain(self.config))
        self.sections = [_settled(section) for section in self.sections]

    def add(self, section: Section | None) -> None:
        """Appends a section. ``None``, a room that did nothing, adds none."""
        if section is not None:
            self.sections.append(_settled(section))

    def finish(self, log_file: Path | None = None) -> Path:
        """Brings the training section up to date with the run's log and writes both files.

        It can be called again at any time, also for a run that was killed: what an earlier call found is
        replaced.

        Args:
            log_file: The log; ``preference_log.jsonl`` in the run's folder if ``None``.

        Returns:
            The page's path.

        Raises:
            OSError: If the log cannot be read or the folder cannot be written to.
        """
        section = training_section(log_file or self.output_dir / LOG_NAME)
        if section is not None:
            self.sections[:] = [one for one in self.sections if not is_training(one)]
            self.add(section)
        self.save()
        return self.write_html()

    def save(self) -> Path:
        """Writes ``dpo_report.json`` in one step and returns its path.

        Raises:
            OSError: If the folder cannot be written to.
        """
        written = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "config": self.config,
            "decisions": [plain(asdict(decision)) for decision in self.decisions],
            "sections": [section_to_json(section) for section in self.sections],
        }
        text = json.dumps(written, indent=1, ensure_ascii=False, allow_nan=False)
        return _write(self.output_dir / JSON_NAME, text)

    def write_html(self) -> Path:
        """Writes ``dpo_report.html`` in one step and returns its path.

        Raises:
            OSError: If the folder cannot be written to.
        """
        return _write(self.output_dir / HTML_NAME, render(self))

    @classmethod
    def load(cls, output_dir: str | os.PathLike[str]) -> RunReport:
        """Reads the report of an earlier run, wherever its folder lies now.

        Raises:
            FileNotFoundError: If there is none in that folder.
            ValueError: If the file is not a report, or one of a later version of this package.
        """
        path = Path(output_dir) / JSON_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {JSON_NAME} in {output_dir}: the run did not get as far as that")
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            version = int(read["schema_version"])
            if version > SCHEMA_VERSION:
                raise ValueError(f"schema version {version}, while this package reads up to {SCHEMA_VERSION}")
            return cls(
                output_dir=Path(output_dir),
                title=read["title"],
                config=read["config"],
                decisions=[decision_from_json(one) for one in read["decisions"]],
                sections=[section_from_json(one) for one in read["sections"]],
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as a run report: {type(error).__name__}: {error}") from error


def _settled(section: Section) -> Section:
    return section_from_json(section_to_json(section))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A lone surrogate (a file name that is not UTF-8) has no encoding; it is shown as "?", not raised.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, path)
    return path
