"""A report comes back from its JSON as it was, and its page is whole, safe and self-contained."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType

import pytest

from axolotl_dpo_ext.report import RunReport, headline, training_section
from axolotl_dpo_ext.vocabulary import Chart, Decision, Example, ExampleGroup, Histogram, Section, Series, Table
from tests.report.preference_logs import end, good_run, measured, start, write

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "</title></summary><script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;"


class Page(HTMLParser):
    """Parses strictly: every element is closed in order. Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def full_report(folder: Path) -> RunReport:
    report = RunReport(
        output_dir=folder,
        title="a run",
        config={"rl": "dpo", "datasets": [{"path": "https://example.com/pairs", "n": 3}], "lora": {}},
        decisions=[Decision("reference", "adapter", "15.0 GiB would not fit")],
    )
    report.add(
        Section(
            title="Data",
            summary="Of 10 pairs 9 are used.",
            facts=(("pairs", 10), ("share", 0.1 + 0.2), ("source", Path("/data/x.jsonl"))),
            tables=(Table(("check", "flagged"), (("equal", 1), ("ratio", 2.5)), "Checks"),),
            histograms=(Histogram("Similarity", (0.0, 0.5, 1.0), {"all": (8, 2), "kept": (8, 1)}, marker=0.95),),
            examples=(
                ExampleGroup(
                    "equal: 1 of 1 pairs", (Example("row 3", "Why?", (("chosen", "So."), ("rejected", "So."))),)
                ),
            ),
            notes=("One pair is equal.",),
            data={"pairs": 10, "worst": math.nan, 1: {"b", "a"}},
        )
    )
    report.add(training_section(write(folder, good_run())))
    return report


def test_json_round_trip_is_equal(tmp_path):
    report = full_report(tmp_path)
    path = report.save()

    assert path == tmp_path / "dpo_report.json"
    assert RunReport.load(tmp_path) == report
    assert len(report.sections) == 2
    assert len(report.sections[1].charts) == 5


def test_a_report_from_before_there_were_histograms_is_read(tmp_path):
    path = full_report(tmp_path).save()
    written = json.loads(path.read_text(encoding="utf-8"))
    for section in written["sections"]:
        del section["histograms"], section["examples"]
    path.write_text(json.dumps(written), encoding="utf-8")
    first = RunReport.load(tmp_path).sections[0]

    assert (first.histograms, first.examples) == ((), ())
    assert first.tables == full_report(tmp_path).sections[0].tables


def test_the_json_is_standard_and_leaves_no_temporary_file(tmp_path):
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    written = json.loads(full_report(tmp_path).save().read_text(encoding="utf-8"), parse_constant=refuse)

    assert written["schema_version"] == 1
    assert written["sections"][0]["data"] == {"pairs": 10, "worst": "nan", "1": ["a", "b"]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dpo_report.json", "preference_log.jsonl"]


def test_non_finite_points_survive_the_round_trip(tmp_path):
    points = ((0.0, 1.0), (1.0, math.inf), (2.0, math.nan))
    report = RunReport(tmp_path, "t", sections=[Section("s", charts=[Chart("c", [Series("a", points)])])])
    report.save()
    read = RunReport.load(tmp_path).sections[0].charts[0].series[0].points

    assert read[:2] == points[:2]
    assert math.isnan(read[2][1])


def test_values_of_any_type_can_be_reported(tmp_path):
    numpy = pytest.importorskip("numpy")
    config = {"dtype": numpy.float32, "rate": numpy.float64(0.5), "map": MappingProxyType({"a": (1, None)})}
    histogram = Histogram("h", numpy.linspace(0, 1, 3), {"all": numpy.array([1, 2])}, marker=numpy.float32(0.5))
    report = RunReport(tmp_path, "t", config=config, sections=[Section("s", histograms=[histogram])])
    report.save()

    assert RunReport.load(tmp_path).sections[0].histograms == (
        Histogram("h", (0.0, 0.5, 1.0), {"all": (1, 2)}, marker=0.5),
    )
    assert RunReport.load(tmp_path).config["rate"] == 0.5
    assert RunReport.load(tmp_path).config["map"] == {"a": [1, None]}


def test_secrets_are_not_written(tmp_path):
    config = {
        "hub_token": "hf_topsecret",
        "nested": [{"wandb_api_key": "topsecret"}],
        "url": "https://user:topsecret@example.com/x",
        "swanlab_lark_webhook_url": "https://open.example.com/hook/topsecret",
        "datasets": [{"path": "https://example.com/d?split=1&token=topsecret&x=2", "token": "topsecret"}],
        "environment": {"AWS_SESSION_TOKEN": "topsecret", "GITHUB_TOKEN": "topsecret"},
        "api_keys": ["topsecret"],
        "special_tokens": {"eos_token": "</s>", "pad_token": "<pad>"},
    }
    report = RunReport(tmp_path, "t", config=config)

    for path in (report.save(), report.write_html()):
        assert "topsecret" not in path.read_text(encoding="utf-8")
    assert report.config["special_tokens"] == config["special_tokens"]
    assert report.config["datasets"][0]["path"] == "https://example.com/d?split=1&token=(hidden)&x=2"
    assert report.config["url"] == "https://example.com/x"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "title"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_that_is_no_report_is_named(tmp_path, content, said):
    (tmp_path / "dpo_report.json").write_text(content)

    with pytest.raises(ValueError, match=said) as caught:
        RunReport.load(tmp_path)
    assert "dpo_report.json" in str(caught.value)


def test_no_report_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dpo_report\.json in"):
        RunReport.load(tmp_path)


def test_the_page_is_well_formed_and_holds_the_figures(tmp_path):
    page = Page(full_report(tmp_path).write_html().read_text(encoding="utf-8"))

    for figure in ("0.938", "11.75", "from 0.000 at step 0 (all ties)", "15.0 GiB would not fit", "0.3"):
        assert figure in page.text
    for title in ("Decisions", "Data", "Training", "Configuration", "Reward accuracy", "datasets[0].path"):
        assert title in page.text
    assert "0.30000000000000004" not in page.text
    assert page.tags.count("svg") == 6
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert "kept: 9, most of them (8) from 0 to 0.5; threshold 0.95." in labels[0]
    assert "held-out from 0 at 0 to 0.938 at 20" in labels[2]


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    text = full_report(tmp_path).write_html().read_text(encoding="utf-8")
    page = Page(text)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)

    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "xlink:href", "style", "srcset"}
    assert not re.search(r"url\(|@import|https?:", style)
    # the only address on the page is the text of the configuration
    assert re.findall(r"https?://[^<\"\s]*", text) == ["https://example.com/pairs"]


def test_what_the_user_controls_is_escaped(tmp_path):
    series = [Series(EVIL, [(0.0, 1.0), (1.0, 2.0)])]
    section = Section(
        title=EVIL,
        summary=EVIL,
        facts=[(EVIL, EVIL)],
        tables=[Table([EVIL], [[EVIL]], EVIL)],
        charts=[Chart(EVIL, series, x_label=EVIL, y_label=EVIL)],
        histograms=[Histogram(EVIL, [0, 1], {EVIL: [1]}, EVIL, EVIL, 0.5, EVIL)],
        examples=[ExampleGroup(EVIL, [Example(EVIL, EVIL, [(EVIL, EVIL)])])],
        notes=[EVIL],
    )
    report = RunReport(tmp_path, EVIL, config={EVIL: EVIL}, decisions=[Decision(EVIL, EVIL, EVIL)], sections=[section])
    text = report.write_html().read_text(encoding="utf-8")
    page = Page(text)

    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(EVIL) >= 27


def test_the_page_of_an_empty_report_is_well_formed(tmp_path):
    page = Page(RunReport(tmp_path, "nothing yet").write_html().read_text(encoding="utf-8"))

    assert "nothing yet" in page.text
    assert "details" not in page.tags


def test_examples_are_folded_with_each_text_in_its_own_direction(tmp_path):
    example = Example("row 7, 0.97 > 0.95", "", [("chosen", "two\nlines"), ("rejected", "שלום")])
    section = Section("s", examples=[ExampleGroup("similarity: 1 of 9", [example])])
    text = RunReport(tmp_path, "t", sections=[section]).write_html().read_text(encoding="utf-8")

    assert re.findall(r'<h4>(\w+)</h4><p dir="auto">([^<]+)</p>', text) == [
        ("chosen", "two\nlines"),
        ("rejected", "שלום"),
    ]
    assert re.findall(r"<summary>(.+?)</summary>", text) == ["similarity: 1 of 9"]
    assert "<details open" not in text


def test_columns_of_figures_are_right_aligned(tmp_path):
    table = Table(("name", "figure", "mixed"), (("a", 1, 2), ("b", "nan", "n/a"), ("short",)))
    text = RunReport(tmp_path, "t", sections=[Section("s", tables=[table])]).write_html().read_text()

    assert re.findall(r'<th scope="col"( class="figure")?>(\w+)', text) == [
        ("", "name"),
        (' class="figure"', "figure"),
        ("", "mixed"),
    ]


def test_finish_replaces_the_training_section_of_an_earlier_call(tmp_path):
    report = RunReport(tmp_path, "t")
    write(tmp_path, good_run()[:4], tail='{"event": "ev')
    report.finish()
    assert "up to step 10" in (tmp_path / "dpo_report.html").read_text(encoding="utf-8")

    write(tmp_path, good_run())
    later = RunReport.load(tmp_path)
    assert later.finish() == tmp_path / "dpo_report.html"

    assert [section.data["steps"] for section in RunReport.load(tmp_path).sections] == [20]
    assert "up to step 10" not in (tmp_path / "dpo_report.html").read_text(encoding="utf-8")


def test_finish_without_a_log_still_writes_the_page(tmp_path):
    report = RunReport(tmp_path, "t", sections=[Section("Data")])

    assert report.finish().is_file()
    assert [section.title for section in RunReport.load(tmp_path).sections] == ["Data"]


def test_a_run_with_non_finite_figures_has_a_page(tmp_path):
    write(tmp_path, [start(), *(measured("eval", step, 0.1, math.nan) for step in (0, 9)), end(9)])
    text = RunReport(tmp_path, "t").finish().read_text(encoding="utf-8")

    assert "from nan at step 0" in Page(text).text


def test_headline_names_the_page(tmp_path):
    lines = headline(full_report(tmp_path)).splitlines()

    assert len(lines) == 3
    assert lines[-1] == f"report:               {tmp_path / 'dpo_report.html'}"
    assert "no training figures" in headline(RunReport(tmp_path, "t"))


def test_the_room_needs_no_training_library():
    code = (
        "import sys, axolotl_dpo_ext.report as r; r.RunReport('x', 't');"
        "print([m for m in ('torch', 'trl', 'transformers', 'axolotl', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"
