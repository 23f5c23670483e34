"""Built-ins and third parties behind the hooks; third parties are really installed, into a folder of their own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from axolotl_dpo_ext.plugins import extensions

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "docs" / "sample_plugin"


@pytest.fixture(scope="module")
def sample_installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs the sample plugin with pip into an empty folder, to be put on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pip = [os.environ.get("UV", "uv"), "pip"]
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(folder), str(SAMPLE)],
        check=True,
    )
    return folder


def write_third_party(folder: Path, name: str, code: str) -> None:
    """Puts an importable module with an entry point into a folder, as an installer would."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[axolotl_dpo_ext]\n{name} = {name}\n", encoding="utf-8")


def doctor(*arguments: object, site: Path, strict: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "AXOLOTL_DPO_EXT_STRICT_PLUGINS": "1" if strict else "",
    }
    command = [sys.executable, "-m", "axolotl_dpo_ext", "doctor", "--json", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_packs_own_are_registered_through_the_hooks():
    registered = extensions()
    assert list(registered.reference_strategies) == ["gpu", "adapter", "cpu_offload", "precomputed"]
    assert {"malformed", "identical", "length_ratio", "similarity"} <= set(registered.pair_checks)
    assert "lexical" in registered.embedders
    assert "cpu" in registered.hardware_presets


@pytest.mark.stack
def test_the_sample_plugin_is_discovered_and_its_names_can_be_used(sample_installed: Path, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "rl: dpo\nadapter: lora\nplugins: [axolotl_dpo_ext.DPOExtPlugin]\n"
        "dpo_ext:\n  reference: uniform\n  hardware: laptop\n"
        "  quality: {embedder: first_letters, policy: {refusal_preferred: drop}}\n",
        encoding="utf-8",
    )
    found = doctor(config, "--quick", site=sample_installed)
    told = json.loads(found.stdout)
    assert found.returncode == 0, found.stdout
    assert told["third_parties"] == {"sample": "dpo-ext-sample 0.1.0"}
    assert told["axolotl_keys"]["optimizer"] == "adafactor"
    assert [d["choice"] for d in told["decisions"]] == ["laptop", "uniform", "every epoch"]


@pytest.mark.stack
def test_the_samples_strategy_refuses_what_it_cannot_serve(sample_installed: Path, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "rl: dpo\nadapter: lora\nload_in_4bit: true\nplugins: [axolotl_dpo_ext.DPOExtPlugin]\n"
        "dpo_ext: {reference: uniform}\n",
        encoding="utf-8",
    )
    found = doctor(config, "--quick", site=sample_installed)
    assert found.returncode == 1
    assert "load_in_4bit" in json.loads(found.stdout)["problems"][0]["found"]


@pytest.mark.stack
def test_the_samples_checks_and_embedder_run_in_an_audit(sample_installed: Path):
    code = """
import json
from datasets import Dataset
from axolotl_dpo_ext.plugins import extensions
from axolotl_dpo_ext.quality import audit
from axolotl_dpo_ext.settings import QualitySettings
rows = Dataset.from_list([
    {"prompt": "a", "chosen": "I cannot help with that.", "rejected": "Take the second street on the left."},
    {"prompt": "b", "chosen": "Take the second street.", "rejected": "As an AI I do not walk."},
    {"prompt": "c", "chosen": "alpha beta gamma", "rejected": "gamma and beta"},
    {"prompt": "d", "chosen": "TAKE the second street. ", "rejected": "Who knows?"},
])
loaded = extensions()
result = audit(rows, settings=QualitySettings(embedder="first_letters", max_length_ratio=100, max_similarity=0.5,
                                     policy={"refusal_preferred": "drop", "similarity": "flag"}),
               checks=list(loaded.pair_checks.values()), embedders=list(loaded.embedders.values()))
print(json.dumps([[r["row"], r["check"], r["action"], r["matched_row"]] for r in result.records]))
"""
    environment = {**os.environ, "PYTHONPATH": str(sample_installed)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [0, "refusal_preferred", "drop", None],
        [1, "stock_answer", "flag", None],
        [2, "similarity", "flag", None],
        [3, "stock_answer", "flag", 1],
    ]


def test_a_third_partys_check_or_embedder_takes_less_than_thirty_lines():
    tree = ast.parse((SAMPLE / "dpo_ext_sample.py").read_text(encoding="utf-8"))
    parts = {"RefusalPreferred", "StockAnswer", "FirstLetters"}
    lines = {n.name: n.end_lineno - n.lineno + 1 for n in tree.body if isinstance(n, ast.ClassDef) and n.name in parts}
    assert set(lines) == parts
    assert max(lines.values()) + 8 < 30, lines  # imports and the hook are eight more


@pytest.mark.stack
def test_the_samples_strategy_hands_over_its_log_probabilities(sample_installed: Path, tmp_path: Path):
    code = f"""
import math, sys
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig
from axolotl_dpo_ext.reference import ReferenceDPOTrainer
words = Tokenizer(models.WordLevel({{w: i for i, w in enumerate("<pad> <eos> a b c d".split())}}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="a")
model = LlamaForCausalLM(LlamaConfig(vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1))
args = DPOConfig({str(tmp_path)!r}, max_steps=1, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no")
trainer = ReferenceDPOTrainer(model, args=args, processing_class=tokenizer, reference="uniform", train_dataset=
    Dataset.from_list([{{"prompt": "a b ", "chosen": "c d", "rejected": "d"}}] * 8))
trainer.train()
logged = trainer.state.log_history[0]
reference = logged["logps/chosen"] - logged["rewards/chosen"] / trainer.beta
assert abs(reference - 3 * -math.log(6)) < 1e-3, reference
assert trainer.ref_model is None
"""
    environment = {**os.environ, "PYTHONPATH": str(sample_installed)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


BROKEN = {
    "cannot_import": "import a_module_that_is_not_there\n",
    "raises_in_hook": (
        "from axolotl_dpo_ext import hookimpl\n@hookimpl\ndef pair_checks():\n    raise RuntimeError('no licence')\n"
    ),
    "takes_a_name": (
        "from axolotl_dpo_ext import hookimpl\nfrom axolotl_dpo_ext.hardware import HardwarePreset\n"
        "@hookimpl\ndef hardware_presets():\n    return [HardwarePreset('new', '', {}), HardwarePreset('cpu', '', {})]\n"
    ),
    "wrong_signature": "from axolotl_dpo_ext import hookimpl\n@hookimpl\ndef embedders(colour):\n    return []\n",
    "ends_the_process": "raise SystemExit(0)\n",
    "returns_nothing": "from axolotl_dpo_ext import hookimpl\n@hookimpl\ndef pair_checks():\n    return [None]\n",
    "returns_a_class": (
        "from axolotl_dpo_ext import hookimpl\nfrom axolotl_dpo_ext.quality import PairCheck\n"
        "@hookimpl\ndef pair_checks():\n    return [PairCheck]\n"
    ),
    "takes_auto": (
        "from axolotl_dpo_ext import hookimpl\nfrom axolotl_dpo_ext.hardware import HardwarePreset\n"
        "@hookimpl\ndef hardware_presets():\n    return [HardwarePreset('auto', '', {})]\n"
    ),
    "name_is_a_number": (
        "from axolotl_dpo_ext import hookimpl\nfrom axolotl_dpo_ext.hardware import HardwarePreset\n"
        "@hookimpl\ndef hardware_presets():\n    return [HardwarePreset(5, '', {})]\n"
    ),
    "no_such_hook": "from axolotl_dpo_ext import hookimpl\n@hookimpl\ndef pear_checks():\n    return []\n",
}


def test_a_broken_third_party_is_named_and_the_rest_goes_on(tmp_path: Path):
    for name, code in BROKEN.items():
        write_third_party(tmp_path, name, code)
    write_third_party(
        tmp_path,
        "sound",
        "from axolotl_dpo_ext import hookimpl\nfrom axolotl_dpo_ext.hardware import HardwarePreset\n"
        "@hookimpl\ndef hardware_presets():\n    return [HardwarePreset('mine', '', {})]\n",
    )
    found = doctor(site=tmp_path)
    told = json.loads(found.stdout)
    assert found.returncode == 0, found.stderr
    assert told["third_parties"] == {"sound": "sound 1.2"}
    assert set(told["failures"]) == {f"{name} ({name} 1.2)" for name in BROKEN}
    assert "a_module_that_is_not_there" in told["failures"]["cannot_import (cannot_import 1.2)"]
    assert "no licence" in told["failures"]["raises_in_hook (raises_in_hook 1.2)"]
    assert "'cpu'" in told["failures"]["takes_a_name (takes_a_name 1.2)"]
    assert {problem["setting"] for problem in told["problems"]} == {
        f"third-party plugin {name} ({name} 1.2)" for name in BROKEN
    }


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_strict_mode_makes_a_broken_third_party_fatal(tmp_path: Path, name: str):
    write_third_party(tmp_path, name, BROKEN[name])
    found = doctor(site=tmp_path, strict=True)
    assert found.returncode == 1
    assert f"the third-party plugin {name} ({name} 1.2) failed" in found.stderr
    assert "Traceback" not in found.stderr
    assert "AXOLOTL_DPO_EXT_STRICT_PLUGINS is set" in found.stderr


RAISES_LATER = """
from axolotl_dpo_ext import hookimpl
from axolotl_dpo_ext.quality import PairCheck
from axolotl_dpo_ext.reference import ReferenceStrategy


class Fragile(ReferenceStrategy):
    name = summary = "fragile"

    def problems(self, config):
        raise KeyError("colour")


class Moody(PairCheck):
    name = summary = "moody"

    def threshold(self, settings):
        return 0.5

    def score(self, batch, settings, embedder):
        raise KeyError("colour")


@hookimpl
def reference_strategies():
    return [Fragile()]


@hookimpl
def pair_checks():
    return [Moody()]
"""


def test_a_third_party_that_raises_when_it_is_used_is_named(tmp_path: Path):
    write_third_party(tmp_path, "raises_later", RAISES_LATER)
    config = tmp_path / "run.yaml"
    config.write_text(
        "rl: dpo\nplugins: [axolotl_dpo_ext.DPOExtPlugin]\npad_to_multiple_of: 8\ndpo_ext: {reference: fragile}\n",
        encoding="utf-8",
    )
    told = json.loads(doctor(config, "--quick", site=tmp_path).stdout)
    problems = {problem["setting"]: problem for problem in told["problems"]}
    assert set(problems) == {"pad_to_multiple_of", "dpo_ext.reference"}, "the others are still told"
    assert "KeyError: 'colour'" in problems["dpo_ext.reference"]["found"]
    assert "raises_later.py" in problems["dpo_ext.reference"]["reason"]


@pytest.mark.parametrize("returned", ["['bad']", "'bad'", "None", "exit()"])
def test_a_strategy_that_returns_no_problems_is_named(tmp_path: Path, returned: str):
    code = RAISES_LATER.replace('raise KeyError("colour")', f"return {returned}", 1)
    write_third_party(tmp_path, "returns_oddly", code)
    config = tmp_path / "run.yaml"
    config.write_text(
        "rl: dpo\nplugins: [axolotl_dpo_ext.DPOExtPlugin]\ndpo_ext: {reference: fragile}\n", encoding="utf-8"
    )
    done = doctor(config, "--quick", site=tmp_path)
    assert [problem["setting"] for problem in json.loads(done.stdout)["problems"]] == ["dpo_ext.reference"]
    assert done.returncode == 1


def test_a_third_party_check_that_raises_stops_the_audit_by_name(tmp_path: Path):
    write_third_party(tmp_path, "raises_later", RAISES_LATER)
    code = """
from datasets import Dataset
from axolotl_dpo_ext.plugins import extensions
from axolotl_dpo_ext.quality import audit
from axolotl_dpo_ext.settings import QualitySettings
audit(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), settings=QualitySettings(),
      checks=list(extensions().pair_checks.values()))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "quality check 'moody' of raises_later failed on rows 0 to 0: KeyError: 'colour'" in done.stderr
    assert "policy: {moody: keep}" in done.stderr
