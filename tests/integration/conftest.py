"""A tiny model, studies on it, and the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import random
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rank_search.cli import run_command

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SEQUENCE_LENGTH = 32
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong for people who use a keyboard, a screen reader, or need contrast."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response
    return [f"{one['id']}: {[node['html'][:120] for node in one['nodes']]}" for one in found["violations"]]


@dataclass(frozen=True)
class Result:
    """What a command returned and wrote."""

    code: int
    out: str
    err: str


def rank_search(*arguments: str | Path) -> Result:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
Script = Callable[..., str]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script of the repository in this process, by its name, and returns what it printed."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_model(folder: Path, hidden: int) -> Path:
    """A Llama of two blocks with random weights, whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of two blocks with its tokenizer."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model", 32)


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture, smaller."""
    return make_model(tmp_path_factory.mktemp("other") / "model", 16)


MakeStudy = Callable[..., Path]


@pytest.fixture(scope="session")
def make_study(tiny_model_folder: Path) -> MakeStudy:
    """Writes a study of seconds into a folder; ``table__key=value`` changes a key, None takes it out."""

    def make(folder: Path, **changes: Any) -> Path:
        words = " ".join(random.Random(0).choices(("low", "rank", "maps", "keep", "what", "layers", "need"), k=1200))
        (folder / "text.txt").write_text(words, encoding="utf-8")
        tables: dict[str, dict[str, Any]] = {
            "model": {"source": str(tiny_model_folder)},
            "targets": {},
            "data": {"train": "text.txt", "sequence_length": SEQUENCE_LENGTH, "calibration_blocks": 8},
            "factors": {},
            "finetune": {"steps": 1, "batch_blocks": 2},
            "search": {"trials": 6, "ladder": [0.8, 0.5]},
            "run": {"threads": 1, "device": "cpu"},
        }
        for key, value in changes.items():
            table, _, name = key.partition("__")
            tables[table][name] = value
        lines = ['name = "tiny"']
        for table, values in tables.items():
            lines.append(f"[{table}]")
            lines += [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
        path = folder / "study.toml"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make
