"""The checks that score every pair by itself: what they flag, what they do not, and what their scores mean."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from datasets import Dataset

from axolotl_dpo_ext.quality import PairBatch, PairCheck, audit
from axolotl_dpo_ext.quality.checks import Identical, LengthRatio, Malformed, Similarity
from axolotl_dpo_ext.quality.embedders import LexicalEmbedder
from axolotl_dpo_ext.quality.tokens import words_as_ids
from axolotl_dpo_ext.settings import QualitySettings

from .conftest import of_lengths, sentence

SETTINGS = QualitySettings()
LEXICAL = LexicalEmbedder()


def batch(pairs: list[tuple[str, str]]) -> PairBatch:
    chosen, rejected = [c for c, _ in pairs], [r for _, r in pairs]
    return PairBatch(
        prompts=["Why?"] * len(pairs),
        chosen=chosen,
        rejected=rejected,
        prompt_ids=words_as_ids(["Why?"] * len(pairs)),
        chosen_ids=words_as_ids(chosen),
        rejected_ids=words_as_ids(rejected),
    )


def flags(check: PairCheck, pairs: list[tuple[str, str]]) -> list[bool]:
    return (check.score(batch(pairs), SETTINGS, LEXICAL) > check.threshold(SETTINGS)).tolist()


@pytest.mark.parametrize("check", [Malformed(), Identical(), LengthRatio(), Similarity()], ids=lambda c: c.name)
def test_scores_do_not_depend_on_which_answer_is_the_chosen_one(check: PairCheck):
    rng = random.Random(1)
    pairs = [(sentence(i, rng.randint(1, 60)), sentence(i + 500, rng.randint(1, 60))) for i in range(100)]
    pairs += [(text, text) for text, _ in pairs[:5]] + [("", "x")]
    there = check.score(batch(pairs), SETTINGS, LEXICAL)
    back = check.score(batch([(r, c) for c, r in pairs]), SETTINGS, LEXICAL)
    assert np.array_equal(there, back, equal_nan=True)
    assert len(set(there.tolist())) > 1


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("caf\u00e9", "cafe\u0301", True),
        ("Zeile eins\nZeile zwei", " Zeile  eins Zeile zwei ", True),
        (
            "\u3053\u3093\u306b\u3061\u306f\u3000\u4e16\u754c",
            "\u3053\u3093\u306b\u3061\u306f \u4e16\u754c",
            True,
        ),
        ("\ud55c\uad6d", unicodedata.normalize("NFD", "\ud55c\uad6d"), True),
        ("Yes", "yes", False),
        ("\U0001f44d", "\U0001f44d\U0001f3fd", False),
        ("x\u00b2", "x2", False),  # equal in NFKC, but x² and x2 are different answers
        ("42", "43", False),
    ],
)
def test_identical_means_equal_after_nfc_and_whitespace(a: str, b: str, same: bool):
    assert flags(Identical(), [(a, b), (b, a)]) == [same, same]


def test_length_ratio_is_in_tokens_and_its_threshold_is_allowed():
    lengths = {"two": 2, "four": 4, "five": 5, "none": 0}.get
    data = Dataset.from_dict(
        {
            "prompt": ["a", "b", "c", "d"],
            "chosen": ["two", "five", "five", "none"],
            "rejected": ["four", "two", "four", "two"],
        }
    )
    result = audit(data, settings=SETTINGS, tokenizer=of_lengths(lambda text: lengths(text, 1)))
    # An answer without any token counts as one: a ratio must stay a number.
    assert result.scores["length_ratio"].tolist() == [2.0, 2.5, 1.25, 2.0]
    assert result.dropped_rows.tolist() == [1]


def test_similarity_of_short_and_foreign_texts():
    scores = Similarity().score(
        batch(
            [
                ("4", "4"),
                ("4", "5"),
                (
                    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059",
                    "\u5927\u962a\u306f\u5927\u304d\u3044\u8857\u3060",
                ),
                ("\U0001f600", "\U0001f600"),
                (
                    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
                    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
                ),
                ("CAF\u00c9 au lait", "cafe\u0301  au lait"),
            ]
        ),
        SETTINGS,
        LEXICAL,
    )
    assert np.isfinite(scores).all()
    assert scores[[0, 3, 4, 5]] == pytest.approx(1.0, abs=1e-12)
    assert (scores <= 1.0).all()
    assert (scores[[1, 2]] < 0.9).all()


def test_parallel_vectors_are_not_above_a_threshold_of_one():
    class Scaled:
        name = "scaled"

        def encode(self, texts):
            return np.array([np.random.default_rng(int(t[1:])).random(7) * (3 if t[0] == "r" else 1) for t in texts])

    check, settings = Similarity(), QualitySettings(max_similarity=1.0)
    scores = check.score(batch([(f"c{i}", f"r{i}") for i in range(300)]), settings, Scaled())
    assert scores == pytest.approx(1.0, abs=1e-12)
    assert not (scores > check.threshold(settings)).any()


def test_word_order_counts():
    text = sentence(3, 60).split()
    (score,) = Similarity().score(batch([(" ".join(text), " ".join(reversed(text)))]), SETTINGS, LEXICAL)
    assert score < 0.95


class Dense:
    """A third party's embedder: dense, not normalised, and blind to some texts."""

    name = "dense"

    def encode(self, texts):
        return np.array([[3.0 * len(text), 0.0] if "blind" not in text else [0.0, 0.0] for text in texts])


def test_similarity_takes_dense_vectors_of_any_length():
    scores = Similarity().score(batch([("a", "bbb"), ("blind", "b")]), SETTINGS, Dense())
    assert scores[0] == 1.0
    assert np.isnan(scores[1])  # a vector without length points nowhere: not applicable, not flagged


def test_an_embedder_with_the_wrong_number_of_rows_is_named():
    class Short(Dense):
        def encode(self, texts):
            return np.ones((1, 3))

    with pytest.raises(ValueError, match=r"'dense'.*\(1, 3\) for 4 texts"):
        Similarity().score(batch([("a", "b"), ("c", "d")]), SETTINGS, Short())


def test_words_of_languages_without_spaces_are_counted():
    texts = [
        "",
        "two words",
        "\u4f60\u597d\u4e16\u754c",
        "\u4f60\u597d, GPU \u4e16\u754c",
        "\uc548\ub155 \ud558\uc138\uc694",
        "na\u00efve caf\u00e9",
    ]
    assert words_as_ids(texts).lengths.tolist() == [0, 2, 4, 6, 2, 2]


@pytest.mark.parametrize(
    "pair",
    [
        ("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", "good", "bad"),
        ("<|user|><|end|><|assistant|>", "good", "bad"),
        ("<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>", "good", "bad"),
        ("what?", "<|im_end|>\n", "bad"),
        ("what?", "good", "</s>"),
        ("what?", "good", "<|user|>[[dummy_message]]<|end|><|assistant|><|end|>"),
    ],
)
def test_what_a_template_leaves_of_an_empty_text_is_malformed(pair: tuple[str, str, str]):
    sound = {"prompt": "<|im_start|>user\nwho?<|im_end|>\n", "chosen": "he<|im_end|>", "rejected": "user<|im_end|>"}
    rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)), sound])
    keep = {"policy": {"length_ratio": "keep", "similarity": "keep"}}
    assert audit(rows, settings=QualitySettings(**keep)).counts["malformed"] == 1
