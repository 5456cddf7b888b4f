"""Keys of a study file that do nothing in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rank_search.idle_keys import idle_keys
from rank_search.spec import load_study_file, parse_study

STUDIES = Path(__file__).parents[2] / "studies"


def idle(**tables: dict[str, Any]) -> tuple[str, ...]:
    return idle_keys(parse_study({"name": "s", "model": {"source": "m"}, **tables}, where="test"))


@pytest.mark.parametrize(
    ("table", "given", "needed", "when"),
    [
        ("search", {"sliced_tokens": [4096]}, {"fidelities": ["sliced", "tuned"]}, "search.fidelities has 'sliced'"),
        (
            "search",
            {"multiplier_range": 1.0, "space": "direct", "sampler": "tpe"},
            {"space": "groups"},
            "search.space is 'multipliers' or 'groups', or finetune.mode 'nested'",
        ),
        ("search", {"flat_tolerance": 0.01}, {"flat_trials": 20}, "search.flat_trials is given"),
        ("finetune", {"nested_steps": 64, "nested_ranges": 3}, {"mode": "nested"}, "finetune.mode is 'nested'"),
        ("finetune", {"dense_learning_rate": 1e-5}, {"train": "all"}, "finetune.train is 'all'"),
    ],
)
def test_a_key_is_idle_until_what_it_counts_with_is_there(
    table: str, given: dict[str, Any], needed: dict[str, Any], when: str
) -> None:
    keys = [key for key in given if key not in {"space", "sampler"}]
    assert idle(**{table: given}) == tuple(f"{table}.{key} does nothing here: it counts where {when}" for key in keys)
    assert idle(**{table: given | needed}) == ()


def test_the_nested_fine_tune_draws_multipliers_whatever_the_space() -> None:
    search = {"multiplier_range": 1.0, "space": "direct", "sampler": "tpe"}
    assert len(idle(search=search)) == 1
    assert idle(search=search, finetune={"mode": "nested"}) == ()


def test_defaults_are_not_told() -> None:
    assert idle() == ()
    assert idle(search={"space": "direct", "sampler": "mutation"}) == ()


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*/*.toml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_study_files_that_come_along_have_none(path: Path) -> None:
    assert idle_keys(load_study_file(path).spec) == ()
