"""Messages of other libraries in ours."""

from __future__ import annotations

from rank_search.errors import one_line


def test_lines_of_a_librarys_message_become_one() -> None:
    assert one_line(ValueError("No such file.\n\n  Look\there.\n")) == "No such file. Look here."
    assert one_line(OSError()) == "OSError"


def test_a_long_message_is_cut_after_a_word_and_says_so() -> None:
    url = "https://hub.example/" + "x" * 40
    cut = one_line(ValueError("word " * 57 + url))
    assert cut == "word " * 57 + "…"
    assert len(one_line(ValueError("x" * 999))) == 300
    assert one_line(ValueError("x" * 300)) == "x" * 300
