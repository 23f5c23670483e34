"""The quickstart with TRL alone, without Axolotl: audit, held-out split, DPO, run report.

    python example_configs/trl_quickstart.py

makes a tiny model and pairs first (see make_tiny_inputs.py) and trains on the CPU in under a minute. Your own:

    python example_configs/trl_quickstart.py --model MODEL --data PAIRS.jsonl --output-dir OUTPUT

MODEL is a folder or a hub id; PAIRS.jsonl has ``prompt``, ``chosen`` and ``rejected`` on every line, as text or
as conversations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from make_tiny_inputs import make_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from axolotl_dpo_ext.quality import audit
from axolotl_dpo_ext.reference import ReferenceDPOTrainer
from axolotl_dpo_ext.report import RunReport, headline
from axolotl_dpo_ext.report.callback import ReportCallback
from axolotl_dpo_ext.settings import QualitySettings
from trl_callbacks import PreferenceLogCallback

TINY = Path("build/quickstart")
MAX_LENGTH = 128  # tokens of prompt and answer


def main(model_name: str, data: Path, output_dir: Path) -> None:
    """Audits the pairs, trains on what is kept, and writes the report into ``output_dir``."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    pairs = Dataset.from_json(str(data))
    audited = audit(
        pairs,
        tokenizer,
        QualitySettings(max_length_ratio=2.0, max_similarity=0.95, holdout=0.15),
        max_length=MAX_LENGTH,
    )
    print(audited.summary_table())

    args = DPOConfig(
        output_dir=str(output_dir),
        beta=0.1,
        learning_rate=5e-4,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_train_epochs=2,
        max_length=MAX_LENGTH,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=20,
        eval_on_start=True,  # the "before" of the report
        save_strategy="no",
        report_to="none",
        bf16=False,
        seed=7,
    )
    report = RunReport(
        output_dir, title="TRL quickstart", config=args.to_sanitized_dict(), sections=[audited.section()]
    )
    trainer = ReferenceDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_name),
        args=args,
        train_dataset=audited.train,
        eval_dataset=audited.heldout,
        processing_class=tokenizer,
        callbacks=[PreferenceLogCallback(), ReportCallback(report)],
        # No second model in memory; another beta or seed reads what this run stores.
        reference={"strategy": "precomputed", "store": str(output_dir / "reference")},
    )
    trainer.train()
    trainer.save_model()
    audited.write_records(output_dir / "dpo_quality_records.jsonl")
    print(headline(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub id; default: a tiny model that is made first")
    parser.add_argument("--data", type=Path, help="pairs as JSON lines; default: pairs that are made first")
    parser.add_argument("--output-dir", type=Path, default=TINY / "trl_output")
    given = parser.parse_args()
    if given.model is None or given.data is None:
        make_inputs(TINY)
    main(given.model or str(TINY / "model"), given.data or TINY / "pairs.jsonl", given.output_dir)
