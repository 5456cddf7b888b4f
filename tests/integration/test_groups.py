"""Statistics and factors group by group, in bounded memory: the same as all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rank_search.factors import build
from rank_search.factors.decompose import NEEDS
from rank_search.factors.groups import in_groups, units
from rank_search.factors.statistics import LayerStatistics, collect_statistics, input_owners
from rank_search.model import device
from rank_search.model.targets import find_targets, rank_space
from rank_search.preparing import prepare
from rank_search.spec import FactorSpec, TargetSpec, load_study_file
from rank_search.task import Examples
from tests.conftest import StudyFactory
from tests.data import models
from tests.data.heard import Heard

BLOCKS = torch.randint(models.VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0)).int()
EXAMPLES = Examples.causal(BLOCKS)


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every collection of statistics from now on, in the order in which they are made."""
    sizes: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> dict[str, LayerStatistics]:
        statistics = collect_statistics(*args, **kwargs)
        matrices = {id(S): S for layer in statistics.values() for S in (layer.A, layer.G) if S is not None}
        sizes.append(sum(S.nbytes for S in matrices.values()))
        return statistics

    monkeypatch.setattr(build, "collect_statistics", noted)
    return sizes


@pytest.mark.parametrize(
    ("family", "targets", "factors"),
    [
        ("llama", TargetSpec(), FactorSpec(anchor=0.6)),
        ("llama", TargetSpec(granularity="head"), FactorSpec(anchor=0.6)),
        ("gpt2", TargetSpec(storage="two-factor"), FactorSpec(anchor=0.7)),  # some layers lose nothing
        ("opt", TargetSpec(), FactorSpec(method="whitened", anchor=1.0)),
    ],
    ids=["llama", "heads", "gpt2", "opt whitened"],
)
def test_groups_change_nothing(family: str, targets: TargetSpec, factors: FactorSpec, collected: list[int]) -> None:
    model = models.make(family)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = find_targets(model, targets)
    limit = 30_000  # bytes, of 150,000 and more
    rounds = 2 if factors.anchor < 1 else 1

    def built(memory: int | None, heard: Heard) -> dict[str, Any]:
        return build.build_factors(
            model, found, EXAMPLES, factors, rank_space(model, found, targets), batch_blocks=4, memory=memory,
            progress=heard,
        )  # fmt: skip

    at_once = built(None, Heard())
    assert len(collected) == rounds  # and none of them is made again
    whole = collected[0]
    del collected[:]
    heard = Heard()
    in_parts = built(limit, heard)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert at_once.keys() == in_parts.keys()
    for name, expected in at_once.items():
        for part in ("out", "inn", "sigma"):
            assert torch.equal(getattr(in_parts[name], part), getattr(expected, part)), f"{name}.{part}"
    assert len(collected) > 2 * rounds
    largest = max(unit.nbytes for unit in units(found, NEEDS[factors.method], input_owners(model, found, EXAMPLES)))
    assert max(collected) <= max(limit, largest) * 1.3 < whole  # heads have blocks of G of their own
    assert len(heard.lines) == (2 if largest > limit // rounds else 1)
    assert heard.lines[0].endswith("are theirs (run.statistics_memory): calibrating group by group")


def test_a_bank_is_the_same_file_however_it_was_made(tiny_study: StudyFactory, tmp_path: Path) -> None:
    files = []
    for memory, work in ((1e-9, "parts"), (1.0, "whole")):
        study = load_study_file(tiny_study(run={"statistics_memory": memory, "work_dir": work}))
        files.append(prepare(study).bank.path.read_bytes())
    assert files[0] == files[1]


def test_batches_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    space = rank_space(model, targets, TargetSpec())
    sizes: list[int] = []

    def cramped(*args: Any, batch_blocks: int, **kwargs: Any) -> dict[str, LayerStatistics]:
        sizes.append(batch_blocks)
        if batch_blocks > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collect_statistics(*args, batch_blocks=batch_blocks, **kwargs)

    def built(heard: Heard) -> dict[str, Any]:
        return build.build_factors(model, targets, EXAMPLES, FactorSpec(), space, batch_blocks=4, progress=heard)

    expected = built(Heard())
    monkeypatch.setattr(build, "collect_statistics", cramped)
    heard = Heard()
    found = built(heard)
    assert sizes == [4, 2, 1, 1]  # the second round begins with what fitted
    assert [line.split(", ")[1] for line in heard.lines] == [f"{n} blocks at a time (run.calibration_batch_blocks)"
                                                             for n in (2, 1)]  # fmt: skip
    for name, layer in expected.items():
        torch.testing.assert_close(found[name].sigma, layer.sigma, rtol=1e-4, atol=1e-7)


def test_layers_that_share_an_input_are_in_one_group() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    owners = input_owners(model, targets, EXAMPLES)
    found = units(targets, NEEDS["kfac"], owners)
    assert [[target.name.rsplit(".", 1)[1] for target in unit.targets] for unit in found] == 2 * [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    statistics = collect_statistics(model, targets, EXAMPLES, batch_blocks=6, seed=0)
    for unit in found:
        matrices = {id(S): S.nbytes for t in unit.targets for S in (statistics[t.name].A, statistics[t.name].G)
                    if S is not None}  # fmt: skip
        assert sum(matrices.values()) == unit.nbytes
    assert [unit.nbytes for unit in units(targets, NEEDS["svd"], owners)] == 8 * [0]


@pytest.mark.parametrize("limit", [1, 30_000, 60_000, 10**9])
def test_groups_are_as_large_as_the_limit_lets_them(limit: int) -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    every = units(targets, NEEDS["kfac"], {})
    nbytes = {target.name: unit.nbytes for unit in every for target in unit.targets}
    groups = in_groups(every, limit)
    assert [target for group in groups for target in group] == list(targets)
    sizes = [sum(nbytes[target.name] for target in group) for group in groups]
    assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    for size, following in zip(sizes, groups[1:], strict=False):
        assert size + nbytes[following[0].name] > limit


def test_the_memory_of_a_host_is_what_its_container_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "_CONTAINER", tmp_path)  # none
    assert device.free_memory(cpu) > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4000\n")
    unlimited = device.free_memory(cpu)
    (tmp_path / "memory.max").write_text("5000\n")
    assert device.free_memory(cpu) == 1000 < unlimited
    (tmp_path / "memory.stat").write_text("anon 10\ninactive_file 500\n")
    assert device.free_memory(cpu) == 1500
