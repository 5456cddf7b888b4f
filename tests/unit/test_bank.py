"""The factor bank: made once, written whole or not at all, found by the next process."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rank_search.errors import BankError
from rank_search.factors import tensor_files
from rank_search.factors.bank import BankKey, FactorBank, Piece, bank_path, open_bank, open_or_build, pieces_of
from rank_search.factors.decompose import Factors, decompose
from rank_search.ranks import LayerShape, RankSpace
from rank_search.spec import FactorSpec
from tests.data.matrices import weight

SHAPES = (LayerShape("a", 12, 20), LayerShape("b", 32, 32), LayerShape("thin", 1, 8))
SPACE = RankSpace(SHAPES, 10_000, "two-factor")
KEY = BankKey.of(None, "weights", "calibration", FactorSpec(), SPACE)
MADE = {"model": "tiny", "device": "cpu"}


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Starts fresh processes that have imported this module already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _factors() -> dict[str, Factors]:
    return {s.name: decompose(s.name, weight(s.m, s.n), None, None, s.max_rank()) for s in SHAPES}


def _never() -> Mapping[str, Factors]:
    raise AssertionError("the bank was there and must not be built again")


def _files(folder: Path) -> list[str]:
    """All files but locks."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def _assert_holds(bank: FactorBank, factors: Mapping[str, Factors]) -> None:
    for name, expected in factors.items():
        assert torch.equal(bank[name].out, expected.out)
        assert torch.equal(bank[name].inn, expected.inn)
        assert torch.equal(bank[name].sigma, expected.sigma)


def test_what_was_built_is_found_again(tmp_path: Path) -> None:
    assert open_bank(tmp_path, KEY) is None
    built = open_or_build(tmp_path, KEY, _factors, MADE)
    found = open_or_build(tmp_path, KEY, _never, MADE)
    _assert_holds(built, _factors())
    _assert_holds(found, _factors())
    assert found.made == MADE
    assert _files(tmp_path) == [bank_path(tmp_path, KEY).name]


def _find(folder: Path) -> None:
    _assert_holds(open_or_build(folder, KEY, _never, MADE), _factors())


def test_another_process_finds_it(tmp_path: Path, processes: ForkServerContext) -> None:
    open_or_build(tmp_path, KEY, _factors, MADE)
    process = processes.Process(target=_find, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "abc"}, {"weights_digest": "other"}, {"calibration_digest": "other"}, {"method": "svd"},
        {"damping": 1e-3}, {"seed": 1}, {"storage": "pivoted"}, {"layers": KEY.layers[:1]}, {"tuned": "nested"},
        {"anchor": 0.6}, {"recalibration_digest": "other"}, {"slope_power": 0.25}, {"gain_step": 0.25},
        {"format_version": 99},
    ],
)  # fmt: skip
def test_whatever_decides_the_content_is_in_the_key(change: dict[str, Any]) -> None:
    other = replace(KEY, **change)
    assert other.digest != KEY.digest
    assert bank_path(Path(), other) != bank_path(Path(), KEY)


def test_every_field_of_the_key_is_tested_above() -> None:
    assert len(fields(BankKey)) == 14


def test_a_key_without_a_gain_is_what_it_was_before_there_were_gains(tmp_path: Path) -> None:
    key = replace(KEY, gain_step=0.0)
    before = {name: value for name, value in asdict(key).items() if name != "gain_step"}
    assert key.digest == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    _assert_holds(open_or_build(tmp_path, key, _factors, MADE), _factors())
    with safe_open(bank_path(tmp_path, key), framework="pt") as file:
        assert "gain_step" not in json.loads(file.metadata()["bank"])["key"]


def test_plain_svd_shares_its_bank_between_calibrations() -> None:
    spec = FactorSpec(method="svd")
    keys = {BankKey.of(None, "weights", calibration, spec, SPACE) for calibration in ("a", "b")}
    assert len(keys) == 1


def test_one_of_many_builds_and_the_others_wait(tmp_path: Path) -> None:
    builds, waiting, all_wait = [], [], Event()

    def build() -> Mapping[str, Factors]:
        builds.append(1)
        assert all_wait.wait(10)
        return _factors()

    def on_wait() -> None:
        waiting.append(1)
        if len(waiting) == 3:
            all_wait.set()

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(open_or_build, tmp_path, KEY, build, MADE, on_wait) for _ in range(4)]
        banks = [job.result() for job in jobs]
    assert len(builds) == 1
    for bank in banks:
        _assert_holds(bank, _factors())


def _build_slowly(folder: Path, log: Path) -> None:
    def build() -> Mapping[str, Factors]:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return _factors()

    _assert_holds(open_or_build(folder, KEY, build, MADE), _factors())


def test_two_processes_build_once(tmp_path: Path, processes: ForkServerContext) -> None:
    log = tmp_path / "log"
    both = [processes.Process(target=_build_slowly, args=(tmp_path / "work", log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "built\n"


def test_a_builder_that_fails_leaves_nothing_and_the_next_one_builds(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        open_or_build(tmp_path, KEY, lambda: {"a": 1 / 0}, MADE)  # type: ignore[dict-item]
    assert _files(tmp_path) == []
    _assert_holds(open_or_build(tmp_path, KEY, _factors, MADE), _factors())


def test_its_factors_are_smaller_than_the_dense_layers(tmp_path: Path) -> None:
    bank = open_or_build(tmp_path, KEY, _factors, MADE)
    with bank.path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert bank.nbytes < sum(4 * shape.dense_params for shape in SHAPES)
    predicted = sum(8 * min(shape.m, shape.n) for shape in SHAPES)
    assert bank.path.stat().st_size == header + bank.nbytes + predicted


@pytest.mark.parametrize(
    "block",
    [
        [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
        [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)],
        [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    ],
    ids=["SmolLM2-135M", "Llama-3-8B", "GPT-2"],
)
def test_with_singular_values_too_it_is_no_larger_than_a_real_models_blocks(block: list[tuple[int, int]]) -> None:
    shapes = [LayerShape("layer", m, n) for m, n in block]
    factors = sum(4 * shape.params(shape.max_rank()) for shape in shapes)
    predicted = sum(8 * min(shape.m, shape.n) for shape in shapes)
    assert factors + predicted <= sum(4 * shape.dense_params for shape in shapes)


def test_tails_fall_to_zero_at_full_rank(tmp_path: Path) -> None:
    tails = open_or_build(tmp_path, KEY, _factors, MADE).tails()
    assert {name: len(tail) for name, tail in tails.items()} == {"a": 13, "b": 33, "thin": 2}
    for shape in SHAPES:
        tail = tails[shape.name]
        assert tail[-1] == 0
        assert (tail[1:] <= tail[:-1]).all()
        assert tail[0] == pytest.approx(0.5 * float(weight(shape.m, shape.n).double().pow(2).sum()))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(4096))


def _foreign(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.out": torch.zeros(2)}, path)


@pytest.mark.parametrize("damage", [_truncate, _empty, _garbage, _foreign])
def test_a_damaged_bank_is_one_clear_line(tmp_path: Path, damage: Any) -> None:
    path = open_or_build(tmp_path, KEY, _factors, MADE).path
    damage(path)
    with pytest.raises(BankError, match=r"^factor bank .* is damaged \(.*\); delete it and run again$") as caught:
        open_or_build(tmp_path, KEY, _never, MADE)
    assert "\n" not in str(caught.value)


def test_a_bank_under_another_name_is_refused(tmp_path: Path) -> None:
    other = replace(KEY, seed=7)
    built = open_or_build(tmp_path, KEY, _factors, MADE)
    built.path.rename(bank_path(tmp_path, other))
    with pytest.raises(BankError, match="was made from something else than its name says; delete it"):
        open_bank(tmp_path, other)


@pytest.mark.parametrize("full_at", ["at its start", "half-way"])
def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if full_at == "at its start":  # nothing is computed for a disk that has no room for it
        monkeypatch.setattr(os, "posix_fallocate", full)
        build = _never
    else:
        monkeypatch.setattr(tensor_files.TensorStream, "write", full)
        build = _factors
    with pytest.raises(BankError, match=r"cannot be written: .*No space left on device; free space or choose another"):
        open_or_build(tmp_path, KEY, build, MADE)
    assert _files(tmp_path) == []


def test_pieces_may_come_in_any_order_and_the_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    pieces = list(pieces_of(_factors()))
    bank = open_or_build(tmp_path, KEY, lambda: iter(pieces[::-1]), MADE)
    _assert_holds(bank, _factors())
    with safe_open(bank.path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {f"{name}.{part}": tensor.contiguous() for name, part, tensor in pieces}
    tensor_files.write_tensors(tmp_path / "expected", tensors, metadata)
    assert bank.path.read_bytes() == (tmp_path / "expected").read_bytes()


def test_what_stops_the_builder_half_way_comes_through_as_it_is(tmp_path: Path) -> None:
    def build() -> Iterator[Piece]:
        yield next(pieces_of(_factors()))
        raise FileNotFoundError("of the text, not of the bank")

    with pytest.raises(FileNotFoundError, match="of the text"):
        open_or_build(tmp_path, KEY, build, MADE)
    assert _files(tmp_path) == []


def test_what_a_killed_process_left_of_a_bank_is_removed(tmp_path: Path) -> None:
    path = bank_path(tmp_path, KEY)
    path.parent.mkdir()
    path.with_name(f".{path.name}.12345").write_bytes(b"half a bank")
    open_or_build(tmp_path, KEY, _factors, MADE)
    assert _files(tmp_path) == [path.name]


def _build_with_a_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    with pytest.raises(BankError, match=r"^factor bank [^\n]* cannot be written: [^\n]*$"):
        open_or_build(folder, KEY, _factors, MADE)


def test_a_real_write_that_fails_leaves_nothing(tmp_path: Path, processes: ForkServerContext) -> None:
    """The kernel refuses to let the file grow; the library's own error is translated."""
    process = processes.Process(target=_build_with_a_limit, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert _files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "banks").write_text("a file is in the way")
    with pytest.raises(BankError, match=r"cannot be written: .*; choose another run.work_dir$"):
        open_or_build(tmp_path, KEY, _factors, MADE)


def test_in_a_folder_that_is_read_only_a_bank_is_opened_and_none_is_built(processes: ForkServerContext) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rs-bank-"))  # pytest's own cannot be entered by another user
    try:
        open_or_build(folder, KEY, _factors, MADE)
        for path in (folder, folder / "banks"):
            path.chmod(0o555)
        with processes.Pool(1) as pool:
            told = pool.apply(_open_as_nobody, (folder,))
    finally:
        for path in (folder, folder / "banks"):
            path.chmod(0o755)
        shutil.rmtree(folder)
    assert told == ["opened", f"factor bank {bank_path(folder, OTHER)} cannot be written: Permission denied; choose "
                    "another run.work_dir"]  # fmt: skip


OTHER = replace(KEY, seed=1)


def _open_as_nobody(folder: Path) -> list[str]:
    if os.geteuid() == 0:  # who may write everywhere
        os.setuid(65534)
    open_or_build(folder, KEY, _never, MADE)
    try:
        open_or_build(folder, OTHER, _factors, MADE)
    except BankError as error:
        return ["opened", str(error)]
    return ["opened", "built"]


def test_on_a_cpu_trials_slice_the_mapped_file(tmp_path: Path) -> None:
    bank = open_or_build(tmp_path, KEY, _factors, MADE)
    assert bank.on(torch.device("cpu"))["a"].out.data_ptr() == bank["a"].out.data_ptr()
