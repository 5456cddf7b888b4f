"""Text and token blocks: what is read, how it is cut, and that no text is in two splits."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rank_search.data import blocks as blocks_module
from rank_search.data.blocks import check_length, token_blocks, tokenizer_digest
from rank_search.data.examples import ExampleTable, column_digest
from rank_search.data.sources import Source, Text, read_text
from rank_search.data.splits import eval_blocks, make_splits, make_test_blocks
from rank_search.errors import DataError
from rank_search.progress import Progress
from rank_search.spec import DataSpec


def prose(seed: int, paragraphs: int = 40, words: int = 60) -> str:
    """Paragraphs of at least 200 characters that no other seed has."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(f"word{n}" for n in rng.integers(0, 10_000, words)) for _ in range(paragraphs)]
    return "\n\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    docs = read_text(Source("python-docs", Path()))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([docs.text[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64)


def text_of(content: str) -> Text:
    return Text(content, str(hash(content)), "a text")


def ids(table: ExampleTable) -> NDArray[np.int32]:
    return table.columns["input_ids"]


def spec(**fields: Any) -> DataSpec:
    defaults: dict[str, Any] = {"sequence_length": 32, "calibration_blocks": 4}
    return DataSpec(**(defaults | fields))


# --- sources


def test_python_docs_are_there_without_a_file_and_always_the_same() -> None:
    first, second = (read_text(Source("python-docs", Path(folder))) for folder in (".", "elsewhere"))
    assert len(first.text) > 100_000
    assert first == second


def test_plain_text_is_read_as_it_stands_relative_to_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("\ufeffÉté.\r\n\r\nHiver.\n".encode())
    assert read_text(Source("book.txt", tmp_path)).text == "Été.\n\nHiver.\n"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_rows_of_tables_are_joined_by_a_blank_line_and_empty_rows_dropped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = ["one, two", "", "NA", "  ", "three"]
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"n": range(5), "body": rows}), path)
    elif suffix == "json":
        path.write_text(json.dumps([{"body": row, "n": 1} for row in rows]))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"body": row, "n": 1}) + "\n" for row in [*rows, None]))
    else:
        separator = "," if suffix == "csv" else "\t"
        path.write_text(f"body{separator}n\n" + "".join(f'"{row}"{separator}1\n' for row in rows))
    assert read_text(Source(path.name, tmp_path, column="body")).text == "one, two\n\nNA\n\nthree"


def test_a_changed_table_is_read_anew(tmp_path: Path) -> None:
    source = Source("rows.jsonl", tmp_path)
    for content in ("before", "after!"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": content}))
        assert read_text(source).text == content


def test_a_folder_is_read_as_a_dataset_with_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": f"the {split} text"}))
    source = Source("corpus", tmp_path, split="test")
    assert read_text(source).text == "the test text"
    with pytest.raises(DataError, match=r"split dev.*Unknown split"):
        read_text(replace(source, split="dev"))
    with pytest.raises(DataError, match=r"no column 'body'; its columns are text"):
        read_text(replace(source, column="body"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "no such file"),
        ("./gone", None, "no such file"),
        ("/no/such/place", None, "no such file"),
        ("gone.parquet", None, "no such file"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("blank.jsonl", b"", "is empty"),
        ("heading.csv", b"text,n\n", "heading.csv"),
        ("blank.csv", b"text,n\n,1\n", "is empty"),
        ("latin.txt", "Été".encode("latin-1"), "not UTF-8"),
        ("latin.csv", "text,n\nÉté,1\n".encode("latin-1"), "utf-8"),
        ("torn.jsonl", b'{"text": "a"}\n{"text": oops', "JSON parse error"),
        ("noise.parquet", b"PAR1 and nothing more", "Parquet"),
        ("other.csv", b"body,n\nhello,1\n", r"no column 'text'; its columns are body, n"),
        ("numbers.jsonl", b'{"text": 12}', "holds int, not text"),
    ],
)
def test_unusable_text_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        read_text(Source(name, tmp_path))
    assert "\n" not in str(refusal.value)


def test_an_unreachable_hub_dataset_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no-such-owner/no-such-dataset \(split train\)") as refusal:
        read_text(Source("no-such-owner/no-such-dataset", tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_hub_id_is_never_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "wiki").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="current folder holds something of that name"):
        read_text(Source("wiki", tmp_path))


# --- blocks


def test_blocks_are_the_text_in_order_without_special_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = text_of(prose(1))
    blocks = token_blocks(text, tokenizer, 32, work_dir=tmp_path)
    assert blocks.dtype == np.int32
    assert blocks.shape[1] == 32
    decoded = tokenizer.decode(blocks.reshape(-1))
    assert text.text.startswith(decoded)
    assert len(text.text) - len(decoded) < 32 * 8  # less than one block is left over


def test_chunks_join_to_the_text_and_end_after_paragraphs() -> None:
    text = prose(2, paragraphs=400) + "x" * 150_000
    chunks = list(blocks_module._chunks(text))
    assert "".join(chunks) == text
    assert len(chunks) > 3
    assert chunks[0].endswith("\n\n")
    assert max(map(len, chunks)) <= blocks_module._CHUNK_CHARACTERS


def test_texts_longer_than_the_tokenizers_limit_are_cut_silently(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(token_blocks(text_of(prose(3)), tokenizer, 32, work_dir=tmp_path)) > tokenizer.model_max_length
    assert not caplog.records


def test_blocks_are_made_once_for_all_who_ask_at_the_same_time(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenised: list[str] = []

    class Counting(Progress):
        def step(self, title: str, total: int | None = None) -> Any:
            tokenised.append(title)
            return super().step(title, total)

    def ask() -> None:
        results.append(column_digest(token_blocks(text, tokenizer, 16, work_dir=tmp_path, progress=Counting())))

    text, results = text_of(prose(4)), list[str]()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokenised) == 1
    assert len(results) == 4
    assert len(set(results)) == 1
    assert len(list((tmp_path / "blocks").glob("*.npy"))) == 1
    assert not list((tmp_path / "blocks").glob("*.part"))


def test_another_length_text_or_tokenizer_makes_other_blocks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    smaller = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    smaller.add_tokens(["word1"])
    text = text_of(prose(5))
    for tokens, content, length in (
        (tokenizer, text, 16),
        (tokenizer, text, 32),
        (tokenizer, text_of(prose(6)), 16),
        (smaller, text, 16),
    ):
        token_blocks(content, tokens, length, work_dir=tmp_path)
    assert len(list((tmp_path / "blocks").glob("*.npy"))) == 4


def test_what_a_tokenizer_was_last_used_for_changes_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_digest(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    try:
        assert tokenizer_digest(tokenizer) == before
        assert len(token_blocks(text_of(prose(7)), tokenizer, 32, work_dir=tmp_path)) > 1
    finally:
        tokenizer.backend_tokenizer.no_truncation()


def test_nothing_is_left_of_blocks_that_could_not_be_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blocks_module.np, "save", full)
    with pytest.raises(DataError, match="No space left on device"):
        token_blocks(text_of(prose(8)), tokenizer, 32, work_dir=tmp_path)
    assert [path.suffix for path in (tmp_path / "blocks").iterdir()] in ([], [".lock"])


def test_damaged_blocks_are_refused_by_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(prose(9))
    token_blocks(text, tokenizer, 32, work_dir=tmp_path)
    (file,) = (tmp_path / "blocks").glob("*.npy")
    for length in (200, 0):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(DataError, match=f"{file.name} are damaged"):
            token_blocks(text, tokenizer, 32, work_dir=tmp_path)


def test_sequences_longer_than_the_model_are_refused() -> None:
    check_length(64, 64)
    check_length(10**6, None)
    with pytest.raises(DataError, match="at most 64 tokens long for this model, not 65"):
        check_length(65, 64)


# --- splits


def test_splits_of_one_text_follow_each_other_and_lose_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text(prose(10))
    whole = token_blocks(read_text(Source("a.txt", tmp_path)), tokenizer, 32, work_dir=tmp_path)
    splits = make_splits(spec(train="a.txt"), tokenizer, tmp_path, tmp_path)
    assert len(splits.calibration) == 4
    assert len(splits.validation) == len(whole) // 10
    np.testing.assert_array_equal(
        np.concatenate([ids(splits.calibration), ids(splits.train), ids(splits.validation)]), whole
    )


def test_asked_for_numbers_of_blocks_are_kept_and_validation_stays_at_the_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text(prose(11))
    whole = token_blocks(read_text(Source("a.txt", tmp_path)), tokenizer, 32, work_dir=tmp_path)
    splits = make_splits(spec(train="a.txt", train_blocks=7, validation_blocks=3), tokenizer, tmp_path, tmp_path)
    np.testing.assert_array_equal(ids(splits.train), whole[4:11])
    np.testing.assert_array_equal(ids(splits.validation), whole[-3:])
    assert splits.calibration_digest == column_digest(whole[:4])
    assert splits.train_digest == column_digest(whole[4:11])
    assert splits.validation_digest == column_digest(whole[-3:])


def test_a_validation_text_of_its_own_leaves_all_of_train(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(prose(12))
    (tmp_path / "b.txt").write_text(prose(13))
    whole = [token_blocks(read_text(Source(n, tmp_path)), tokenizer, 32, work_dir=tmp_path) for n in ("a.txt", "b.txt")]
    splits = make_splits(spec(train="a.txt", validation="b.txt"), tokenizer, tmp_path, tmp_path)
    assert len(splits.calibration) + len(splits.train) == len(whole[0])
    np.testing.assert_array_equal(ids(splits.validation), whole[1])


def test_a_digest_tells_blocks_of_the_same_tokens_in_another_shape_apart() -> None:
    ids = np.arange(24, dtype=np.int32)
    assert column_digest(ids.reshape(4, 6)) != column_digest(ids.reshape(6, 4))
    assert column_digest(ids.reshape(4, 6)) == column_digest(ids.reshape(4, 6).astype(">i4"))


def test_a_text_too_short_says_what_is_there_and_what_is_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text(prose(14, paragraphs=2))
    found = len(token_blocks(read_text(Source("a.txt", tmp_path)), tokenizer, 32, work_dir=tmp_path))
    message = rf"a.txt has {found} blocks of 32 tokens, but 110 are needed \(4 calibration \+ 100 training \+ 6 valid"
    with pytest.raises(DataError, match=message):
        make_splits(spec(train="a.txt", train_blocks=100, validation_blocks=6), tokenizer, tmp_path, tmp_path)
    with pytest.raises(DataError, match="fewer than one block of 10000"):
        make_splits(spec(train="a.txt", sequence_length=10_000), tokenizer, tmp_path, tmp_path)


def test_exactly_enough_blocks_are_enough_and_one_less_is_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text(prose(15))
    found = len(token_blocks(read_text(Source("a.txt", tmp_path)), tokenizer, 32, work_dir=tmp_path))
    splits = make_splits(
        spec(train="a.txt", train_blocks=found - 6, validation_blocks=2), tokenizer, tmp_path, tmp_path
    )
    assert len(splits.train) == found - 6
    with pytest.raises(DataError, match=f"but {found + 1} are needed"):
        make_splits(spec(train="a.txt", train_blocks=found - 5, validation_blocks=2), tokenizer, tmp_path, tmp_path)


@pytest.mark.parametrize("way", ["same name", "other name", "copy", "most of it", "wrapped anew"])
def test_a_validation_text_that_stands_in_train_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, way: str
) -> None:
    train = prose(16)
    (tmp_path / "a.txt").write_text(train)
    name = {"same name": "a.txt", "other name": "./sub/../a.txt"}.get(way, "b.txt")
    (tmp_path / "sub").mkdir()
    if way == "copy":
        (tmp_path / name).write_text(train)
    elif way == "most of it":
        (tmp_path / name).write_text("\n\n".join(train.split("\n\n")[:21]) + "\n\n" + prose(17, paragraphs=19))
    elif way == "wrapped anew":
        (tmp_path / name).write_text(train.replace(" ", "\n"))
    with pytest.raises(DataError, match=r"data\.validation and data\.train must not share text"):
        make_splits(spec(train="a.txt", validation=name), tokenizer, tmp_path, tmp_path)


def test_a_few_shared_paragraphs_are_no_overlap(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = prose(18)
    (tmp_path / "a.txt").write_text(train)
    (tmp_path / "b.txt").write_text("\n\n".join(train.split("\n\n")[:19]) + "\n\n" + prose(19, paragraphs=21))
    assert len(make_splits(spec(train="a.txt", validation="b.txt"), tokenizer, tmp_path, tmp_path).validation) > 0


def test_python_docs_are_not_validated_on_themselves(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="both are python-docs"):
        make_splits(spec(validation="python-docs"), tokenizer, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("train_split", "validation_split", "shared"),
    [
        ("train", "validation", False),
        ("train", "train", True),
        ("train[:90%]", "train[80%:]", True),
        ("train+extra", "extra", True),
        ("all", "validation", True),
    ],
)
def test_one_dataset_may_be_both_only_under_different_splits(
    tmp_path: Path, train_split: str, validation_split: str, shared: bool
) -> None:
    for name in ("owner/corpus", str(tmp_path)):
        train = Source(name, tmp_path, split=train_split)
        assert train.shares_rows_with(replace(train, split=validation_split)) is shared
    assert not train.shares_rows_with(Source("other/corpus", tmp_path, split=train_split))


def test_a_test_text_must_be_new_to_train_and_validation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, seed in (("a.txt", 20), ("b.txt", 21), ("c.txt", 22)):
        (tmp_path / name).write_text(prose(seed))
    (tmp_path / "copy.txt").write_text(prose(21))
    whole = token_blocks(read_text(Source("c.txt", tmp_path)), tokenizer, 32, work_dir=tmp_path)
    names = {"train": "a.txt", "validation": "b.txt"}
    test = make_test_blocks(spec(test="c.txt", test_blocks=5, **names), tokenizer, tmp_path, tmp_path)
    np.testing.assert_array_equal(test, whole[:5])
    for taken, role in (("a.txt", "train"), ("b.txt", "validation"), ("copy.txt", "validation")):
        with pytest.raises(DataError, match=rf"data\.test and data\.{role} must not share text"):
            make_test_blocks(spec(test=taken, **names), tokenizer, tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"add data\.test"):
        make_test_blocks(spec(**names), tokenizer, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("test", "role"), [("a.txt", "train"), ("b.txt", "validation"), ("copy.txt", "validation"), ("most.txt", "train")]
)
def test_a_search_refuses_a_test_text_that_it_would_see(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, test: str, role: str
) -> None:
    train, validation = prose(23), prose(24)
    most = "\n\n".join([*train.split("\n\n")[:21], prose(25, paragraphs=19)])
    for name, text in (("a.txt", train), ("b.txt", validation), ("copy.txt", validation), ("most.txt", most)):
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"data\.test and data\.{role} must not share text.*; name a text that"):
        make_splits(spec(train="a.txt", validation="b.txt", test=test), tokenizer, tmp_path, tmp_path)
    assert not (tmp_path / "blocks").exists()


def test_a_test_text_changes_nothing_in_a_search_and_no_block_is_made_of_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text(prose(26))
    (tmp_path / "c.txt").write_text(prose(27))
    without = make_splits(spec(train="a.txt"), tokenizer, tmp_path, tmp_path)
    splits = make_splits(spec(train="a.txt", test="c.txt"), tokenizer, tmp_path, tmp_path)
    assert splits.train_digest == without.train_digest
    assert splits.validation_digest == without.validation_digest
    assert len(list((tmp_path / "blocks").glob("*.npy"))) == 1


def test_a_search_does_not_fetch_a_test_text_of_the_hub(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_arguments: object, **_options: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    (tmp_path / "a.txt").write_text(prose(28))
    make_splits(spec(train="a.txt", test="owner/corpus"), tokenizer, tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"both are owner/corpus \(split test\)"):
        make_splits(spec(train="owner/corpus", train_split="test", test="owner/corpus"), tokenizer, tmp_path, tmp_path)


def test_evaluation_takes_the_first_blocks_of_any_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = Source("python-docs", tmp_path)
    some = eval_blocks(source, tokenizer, 64, work_dir=tmp_path, blocks=3)
    every = eval_blocks(source, tokenizer, 64, work_dir=tmp_path)
    np.testing.assert_array_equal(some, every[:3])
    with pytest.raises(DataError, match=f"has {len(every)} blocks of 64 tokens, but 100000 are needed"):
        eval_blocks(source, tokenizer, 64, work_dir=tmp_path, blocks=100_000)
