"""Text on disk becomes rows of tokens: arrays, text files and JSONL, with a tokenizer that the test trains."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch

from icl.analysis.language import _vocabulary_ngrams
from icl.config import RunConfig
from icl.config.validation import ConfigError
from icl.tasks.corpus import Corpus, open_corpus, read_vocabulary, tokenise
from icl.tasks.rows import row_source
from tests.tasks.test_rows import rows_of, run

DOCUMENTS = ["the cat sat on the mat", "a dog sat on a log", "the end"]


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip(
        "tokenizers", reason="The package tokenizers is not installed: pip install icl[language]"
    )
    words = sorted({word for text in DOCUMENTS for word in text.split()})
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    return words


def by_loop(words, context_size, bos):
    """Return the rows of the documents: BOS, then the next tokens; documents are joined by the same token."""
    text = [token for document in DOCUMENTS for token in [*(words.index(word) for word in document.split()), bos]]
    step = context_size - 1
    return [[bos, *text[i : i + step]] for i in range(0, len(text) - step + 1, step)]


def test_text_files_and_jsonl_give_the_rows_of_a_loop(tokenizer, tmp_path):
    config = run(
        source=str(tmp_path / "text"), tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=20, context_size=6
    )
    (tmp_path / "text").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    expected = by_loop(tokenizer, 6, 19)
    corpus = open_corpus(config.language)
    assert corpus.rows(torch.arange(corpus.num_rows)).tolist() == expected
    records = tmp_path / "documents.jsonl"
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    beside = open_corpus(run(source=str(records), vocab_size=20, context_size=6).language)  # the tokenizer beside it
    assert np.array_equal(beside.tokens, corpus.tokens)


@pytest.mark.parametrize("kind", ["rows", "long text"])
def test_arrays_on_disk_are_read_where_they_lie(kind, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 20, (40, 9) if kind == "rows" else 400).astype(np.uint16)
    np.save(tmp_path / "tokens.npy", array)
    corpus = open_corpus(run(source=str(tmp_path / "tokens.npy"), vocab_size=20, context_size=8).language)
    assert isinstance(corpus.tokens, np.memmap)
    got = corpus.rows(torch.tensor([[3, 0]]))[0].tolist()
    if kind == "rows":
        assert got == [array[3, :8].tolist(), array[0, :8].tolist()]
    else:
        assert got == [[19, *array[21:28].tolist()], [19, *array[:7].tolist()]]
        assert corpus.num_rows == 400 // 7


def test_rows_are_functions_of_step_and_index_and_the_last_are_held_out(tmp_path):
    array = np.arange(100)[:, None] * np.ones((1, 5), np.int64)  # row r consists of r
    np.save(tmp_path / "tokens.npy", array)
    config = run(source=str(tmp_path / "tokens.npy"), vocab_size=100, context_size=5)  # 2 x 8 rows are held out
    rows = rows_of(config, range(50), range(20))[..., 0]
    assert torch.equal(rows[7, 5:9], rows_of(config, range(7, 8), range(5, 9))[0, :, 0])
    assert set(rows.flatten().tolist()) == set(range(84))  # each of 84 rows is missed with probability 6e-6
    assert rows_of(config, range(1), range(8), stream="test")[0, :, 0].tolist() == list(range(92, 100))
    assert rows_of(config, range(1, 2), range(8), stream="test")[0, :, 0].tolist() == list(range(84, 92))
    assert set(rows_of(config, range(50), range(20), stream="llc").flatten().tolist()) == set(range(84))
    with pytest.raises(ConfigError, match=r"2 sets of 8 rows for evaluation .* no row 8 of set 0"):
        row_source(config, stream="test").sample(range(1), range(9))
    with pytest.raises(ConfigError, match="no row 7 of set 2"):
        row_source(config, stream="test").sample(range(2, 3), range(8))


def test_the_text_changes_at_a_step_for_training_rows_only(tmp_path):
    for name, first in (("a", 0), ("b", 100)):
        np.save(tmp_path / f"{name}.npy", np.arange(first, first + 40)[:, None] * np.ones((1, 5), np.int64))
    texts = {"source": str(tmp_path / "a.npy"), "next_source": str(tmp_path / "b.npy"), "change_step": 7}
    config = run(**texts, vocab_size=200, context_size=5)
    rows = rows_of(config, range(20), range(30))[..., 0]
    assert set(rows[:7].flatten().tolist()) == set(range(24))  # 2 x 8 rows are held out
    assert set(rows[7:].flatten().tolist()) == set(range(100, 140))
    for steps in (range(5, 7), range(6, 8), range(7, 9)):  # a resumed run may begin anywhere
        assert torch.equal(rows_of(config, steps, range(30))[..., 0], rows[steps.start : steps.stop])
    assert set(rows_of(config, range(20), range(30), stream="llc").flatten().tolist()) == set(range(24))
    alone = run(source=texts["source"], vocab_size=200, context_size=5)
    assert torch.equal(rows_of(alone, range(7), range(30))[..., 0], rows[:7])
    assert not {"next_source", "change_step"} & set(alone.to_dict()["language"])
    assert config.to_dict()["language"]["change_step"] == 7
    assert RunConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="set both, or neither"):
        run(source=texts["source"], change_step=7)
    with pytest.raises(ConfigError, match=r"works only with texts"):
        run(next_source=texts["source"], change_step=7)
    np.save(tmp_path / "b.npy", np.zeros(3, np.int64))
    open_corpus.cache_clear()
    with pytest.raises(ConfigError, match=r"\(`language.next_source`\) has no row of 5 tokens"):
        rows_of(config, range(1), range(1))


def test_ngrams_of_a_larger_vocabulary_are_its_first_entries_of_this_many_tokens(tokenizer, tmp_path):
    text = run(tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=20, context_size=6).language
    entries = ["the", "the cat", "on a log", "a dog", "sat on the mat", "the the the"]
    (tmp_path / "words.json").write_text(json.dumps(entries))
    (tmp_path / "words.txt").write_text("\n".join(entries) + "\n")
    number = {word: i for i, word in enumerate(tokenizer)}
    for name in ("words.json", "words.txt"):
        pairs, triples, fours = _vocabulary_ngrams(text, str(tmp_path / name), 1)
        assert pairs.tolist() == [[number["the"], number["cat"]]]
        assert triples.tolist() == [[number[word] for word in ("on", "a", "log")]]
        assert fours.tolist() == [[number[word] for word in ("sat", "on", "the", "mat")]]
    assert read_vocabulary(str(tmp_path / "tokenizer.json")) == tokenizer
    with pytest.raises(ConfigError, match=r"splits no entry of .* into 2 to 4 tokens"):
        _vocabulary_ngrams(text, str(tmp_path / "tokenizer.json"), 1)
    small = dataclasses.replace(text, vocab_size=3)
    with pytest.raises(ConfigError, match="Give the tokenizer with which the run was trained"):
        _vocabulary_ngrams(small, str(tmp_path / "words.json"), 9)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_vocabulary(str(tmp_path / "nothing.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="neither a list of strings nor a tokenizer"):
        read_vocabulary(str(tmp_path / "bad.json"))


def test_datasets_of_the_hub_are_tokenised_or_taken_as_tokens(tokenizer, tmp_path, monkeypatch):
    class Table(list):
        column_names = ("contents",)

    stand_in = types.ModuleType("datasets")
    asked = []
    stand_in.load_dataset = lambda name, split: asked.append((name, split)) or table
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    table = Table({"contents": text} for text in DOCUMENTS)
    language = run(
        source="hf://user/text",
        tokenizer=str(tmp_path / "tokenizer.json"),
        column="contents",
        vocab_size=20,
        context_size=6,
    ).language
    corpus = open_corpus(language)
    assert corpus.rows(torch.arange(corpus.num_rows)).tolist() == by_loop(tokenizer, 6, 19)
    assert asked == [("user/text", "train")]
    table = Table({"contents": [1, 2, 3]} for _ in range(4))
    tokens = open_corpus(run(source="hf://user/tokens", column="contents", vocab_size=20, context_size=6).language)
    assert tokens.tokens.tolist() == [1, 2, 3, 19] * 4
    with pytest.raises(
        ConfigError, match=r"`language\.column` is 'text', but the columns of hf://user/text2 are contents"
    ):
        open_corpus(run(source="hf://user/text2").language)


def test_what_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    def refused(match, **language):
        with pytest.raises(ConfigError, match=match):
            open_corpus(run(**language).language)

    refused("but there is no .npy, .txt, .jsonl or .json file at this path", source=str(tmp_path))
    refused("cannot be read: No such file", source=str(tmp_path / "a.npy"))
    (tmp_path / "b.npy").write_bytes(b"no array")
    refused("is not a NumPy array of tokens", source=str(tmp_path / "b.npy"))
    np.save(tmp_path / "c.npy", np.zeros((3, 4)))
    refused(r"must have whole numbers .* got float64 of shape \(3, 4\)", source=str(tmp_path / "c.npy"))
    np.save(tmp_path / "d.npy", np.full(1000, 300))
    refused("has tokens from 300 to 300, but `language.vocab_size` is 64", source=str(tmp_path / "d.npy"))
    (tmp_path / "e.jsonl").write_text('{"text": 3}\n')
    refused("Set `language.tokenizer`|needs the package `tokenizers`", source=str(tmp_path / "e.jsonl"))
    np.save(tmp_path / "f.npy", np.zeros(300, np.int32))
    with pytest.raises(ConfigError, match="has 4 rows of 64 tokens, too few to hold out 2 x 8"):
        row_source(run(source=str(tmp_path / "f.npy")), stream="train")
    for package, source in (("datasets", "hf://a/b"), ("tokenizers", str(tmp_path / "e.jsonl"))):
        monkeypatch.setitem(sys.modules, package, None)
        refused(f"needs the package `{package}`. Install it with", source=source)


def test_text_with_more_tokens_than_the_vocabulary_is_refused(tokenizer, tmp_path):
    language = run(tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=5, context_size=4).language
    with pytest.raises(ConfigError, match=r"but `language\.vocab_size` is 5"):
        tokenise(iter(DOCUMENTS), language)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        tokenise(iter(DOCUMENTS), language)


def test_a_row_beyond_the_checked_beginning_of_an_array_is_still_checked():
    corpus = Corpus(np.array([1] * 20 + [200] * 20), run(vocab_size=100, context_size=11).language)
    corpus.rows(torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="tokens from 1 to 200"):
        corpus.rows(torch.tensor([0, 2]))
