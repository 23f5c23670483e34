"""Embedders by the name of a library or by a model's folder."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from axolotl_dpo_ext.quality.builtins import embedders
from axolotl_dpo_ext.quality.embedding import embedder_problems, find_embedder
from axolotl_dpo_ext.vocabulary import ConfigurationError
from tests.quality.conftest import sentence

TEXTS = [
    sentence(1),
    "The river.",
    "川と橋",
    "",
    "   ",
    sentence(2, words=700),
    "🦀 crab",
    "The river.\n",
    sentence(3, words=3),
]
SHARED_START = sentence(4, words=700)


class Registered:
    name = "mine"

    def encode(self, texts):
        return np.ones((len(texts), 2))


def make_word_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[PAD]", "[UNK]", *sorted(set(sentence(0, words=2000).split()))]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of model2vec: random vectors for some words."""
    model2vec = pytest.importorskip("model2vec")
    tokenizer = make_word_tokenizer()
    vectors = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 16)).astype(np.float32)
    folder = tmp_path_factory.mktemp("static")
    model2vec.StaticModel(vectors, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentence-transformers: a BERT of random weights that takes 64 tokens."""
    library = pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizer

    scratch, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("sentence")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(sentence(0, words=2000).split()))]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}, model_max_length=64).save_pretrained(scratch)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(scratch)
    library.SentenceTransformer(str(scratch)).save_pretrained(str(folder))
    return folder


@pytest.fixture(params=["static_model", "sentence_model"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_registered_name_goes_first_and_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    mine = Registered()
    assert find_embedder("mine", [*embedders(), mine]) is mine
    assert find_embedder("lexical", embedders()).name == "lexical"


def test_a_folder_says_by_its_files_which_library_loads_it(model: Path, request: pytest.FixtureRequest):
    assert embedder_problems(str(model), []) == []
    found = find_embedder(str(model), [])
    assert found.name == str(model), "results name the embedder as the user did"
    library = "model2vec" if "static_model" in request.fixturenames else "sentence-transformers"
    named = find_embedder(f"{library}:{model}", [])
    assert type(named) is type(found)
    assert (model / "modules.json").is_file(), "both libraries write it, so it tells nothing"
    np.testing.assert_array_equal(named.encode(TEXTS), found.encode(TEXTS))


def test_vectors_have_one_row_a_text_and_do_not_depend_on_the_other_texts(model: Path):
    embedder = find_embedder(str(model), [])
    together = embedder.encode(TEXTS)
    assert together.dtype == np.float32
    assert together.shape[0] == len(TEXTS)
    np.testing.assert_array_equal(embedder.encode(TEXTS), together)
    np.testing.assert_allclose(embedder.encode(TEXTS[::-1])[::-1], together, atol=1e-6)
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_static_vectors_are_the_same_to_the_last_bit_in_any_batch(static_model: Path):
    embedder = find_embedder(str(static_model), [])
    texts = [sentence(number, words=number % 7) for number in range(700)]
    together = embedder.encode(texts)
    assert not together[0].any(), "no token, no direction: the check gives such a pair no score"
    np.testing.assert_array_equal(np.concatenate([embedder.encode([text]) for text in texts]), together)


def test_answers_that_differ_only_after_a_long_start_have_different_vectors(model: Path):
    embedder = find_embedder(str(model), [])
    first, second, again = embedder.encode(
        [f"{SHARED_START} {'river ' * 400}", f"{SHARED_START} {'doctor ' * 400}", f"{SHARED_START} {'river ' * 400}"]
    )
    assert cosine(first, again) > 1 - 1e-6
    assert cosine(first, second) < 0.999


def test_a_text_that_the_model_takes_whole_has_the_librarys_own_vector(sentence_model: Path):
    import sentence_transformers

    text = sentence(5, words=60)
    own = sentence_transformers.SentenceTransformer(str(sentence_model)).encode(text)
    found = find_embedder(str(sentence_model), []).encode([text, SHARED_START])[0]
    np.testing.assert_allclose(found, own, atol=1e-6)


def test_a_long_text_is_the_mean_of_its_pieces_by_tokens(sentence_model: Path):
    words = sentence(6, words=62 + 31).split()  # of 64 tokens two are [CLS] and [SEP]
    embedder = find_embedder(str(sentence_model), [])
    long, first, rest = embedder.encode([" ".join(words), " ".join(words[:62]), " ".join(words[62:])])
    np.testing.assert_allclose(long, (2 * first + rest) / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "name", "line"),
    [
        ("model2vec", "model2vec:somebody/potion", "pip install 'axolotl-dpo-ext[semantic]'"),
        (
            "sentence_transformers",
            "sentence-transformers:all-MiniLM-L6-v2",
            "pip install 'axolotl-dpo-ext[sentence-transformers]'",
        ),
    ],
)
def test_a_missing_library_gives_the_line_that_installs_it(
    module: str, name: str, line: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)  # how Python marks a module as not importable
    (problem,) = embedder_problems(name, embedders())
    assert line in problem.fix
    assert module in problem.reason
    with pytest.raises(ConfigurationError, match=re.escape(line)):
        find_embedder(name, embedders())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lexcal", "did you mean 'lexical'?"),
        ("bert", "choose from: lexical Or name a model: model2vec:MODEL, sentence-transformers:MODEL, or its folder"),
        ("model2vce:somebody/potion", "did you mean 'model2vec:somebody/potion'?"),
        ("sentence_transformers:all-MiniLM", "did you mean 'sentence-transformers:all-MiniLM'?"),
        ("somebody/potion", "'model2vec:somebody/potion' or 'sentence-transformers:somebody/potion'"),
        ("model2vec:", "it names no model"),
        ("./nowhere", "there is no folder 'nowhere'"),
        ("model2vec:./nowhere", "there is no folder 'nowhere'"),
        ("sentence-transformers:/no/such/model", "there is no folder '/no/such/model'"),
        ("empty", "a folder with nothing"),
        ("model2vec:empty", "does not hold a model of model2vec"),
        ("llama", "a folder with config.json, model.safetensors, tokenizer.json"),
        ("broken", "the folder does not hold an embedding model"),
        ("file.bin", "it is a file; a model is a folder"),
        ("model2vec:file.bin", "it is a file; a model is a folder"),
    ],
)
def test_a_name_that_means_nothing_is_a_problem_that_says_what_to_write(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from safetensors.numpy import save_file

    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "llama", "broken"):
        (tmp_path / folder).mkdir()
    for folder in ("llama", "broken"):
        for file in ("config.json", "tokenizer.json"):
            (tmp_path / folder / file).write_text("{}", encoding="utf-8")
    save_file({"model.embed_tokens.weight": np.ones((2, 2))}, tmp_path / "llama" / "model.safetensors")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "file.bin").write_bytes(b"")
    (problem,) = embedder_problems(name, embedders())
    assert problem.setting == "dpo_ext.quality.embedder"
    assert expected in str(problem)
    with pytest.raises(ConfigurationError):
        find_embedder(name, embedders())


@pytest.mark.parametrize("library", ["model2vec", "sentence-transformers"])
def test_a_name_that_the_hub_does_not_give_is_one_problem(library: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip(library.replace("-", "_"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert embedder_problems(f"{library}:nobody/no-such-model", []) == []
    with pytest.raises(ConfigurationError, match="there is no folder 'nobody/no-such-model', and the Hub") as caught:
        find_embedder(f"{library}:nobody/no-such-model", [])
    assert "hf download nobody/no-such-model" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 4


def test_a_damaged_model_is_a_problem_that_names_the_folder(model: Path, tmp_path: Path):
    import shutil

    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="the model in that folder does not load"):
        find_embedder(str(damaged), [])


def test_a_tokenizer_that_cannot_say_where_tokens_begin_is_said(
    sentence_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    import transformers

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "is_fast", False, raising=False)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with caplog.at_level(logging.WARNING):
        embedder = find_embedder(str(sentence_model), [])
    assert "reads the first 64 tokens" in caplog.text
    assert embedder.encode([SHARED_START]).shape == (1, 32)


def test_looking_at_a_name_imports_no_library(tmp_path: Path):
    (tmp_path / "modules.json").write_text(json.dumps([]), encoding="utf-8")
    code = (
        "import sys\nfrom axolotl_dpo_ext.quality.embedding import embedder_problems\n"
        "for name in (sys.argv[1], 'model2vec:a/b', 'sentence-transformers:c'): embedder_problems(name, [])\n"
        "print({'torch', 'transformers', 'model2vec', 'sentence_transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
