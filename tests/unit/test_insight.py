"""What a study is said to have found out: facts that were put into made-up losses come out again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rank_search import api
from rank_search.cli import run_command
from rank_search.errors import InputError
from rank_search.export.insight_figures import insight_figure
from rank_search.front import Front, FrontPoint
from rank_search.insight import above_others, agreement, profile, tendencies
from rank_search.measurement import Fidelity
from rank_search.ranks import RankMap
from rank_search.study.study import Study
from tests.contract.synthetic import make_allocator, make_facts, make_spec, measure


def points(maps: dict[str, RankMap]) -> list[FrontPoint]:
    allocator = make_allocator()
    found = []
    for number, (source, rank_map) in enumerate(maps.items()):
        found.append(FrontPoint(number, rank_map, measure(rank_map, allocator=allocator), source))
    return found


def test_the_closed_form_wants_nothing_else() -> None:
    allocator = make_allocator()
    closed = points({f"closed form {kept}": allocator.closed_form(kept) for kept in (0.4, 0.6, 0.8)})
    found = tendencies(closed, closed, allocator.space)
    assert len(found) == 2 * 3
    assert all(tendency.difference == pytest.approx(0, abs=1e-9) and tendency.points == 3 for tendency in found)
    assert tendencies(closed, [], allocator.space) == ()


def test_what_the_front_gives_to_one_type_is_seen() -> None:
    allocator = make_allocator()
    closed = points({f"closed form {kept / 20}": allocator.closed_form(kept / 20) for kept in range(7, 20)})
    bent = points(
        {"tpe": allocator.closed_form(0.6, {s.name: 2.0 for s in allocator.space.shapes if s.group == "attn"})}
    )
    found = tendencies(bent, closed, allocator.space)
    change = {group: sum(t.difference for t in found if t.group == group) for group in ("attn", "mlp")}
    assert change["attn"] > 0.1
    assert change["mlp"] < -0.05


def test_a_point_below_the_smallest_closed_form_is_left_out() -> None:
    allocator = make_allocator()
    closed = points({"closed form 0.6": allocator.closed_form(0.6)})
    assert tendencies(points({"tpe": allocator.closed_form(0.5)}), closed, allocator.space) == ()


def test_agreement_at_equal_size_sees_through_what_size_explains() -> None:
    random = np.random.default_rng(0)
    kept = random.uniform(0.3, 0.95, 60)
    own, noise = random.normal(0, 0.01, (2, 60))
    higher = 3 + (1 - kept) ** 2 + own
    telling = agreement("a", list(zip(kept, 4 + 2 * (1 - kept) ** 2 + own, higher, strict=True)))
    blind = agreement("b", list(zip(kept, 4 + 2 * (1 - kept) ** 2 + noise, higher, strict=True)))
    assert telling is not None
    assert blind is not None
    assert telling.spearman > 0.95 < blind.spearman
    assert telling.at_equal_size is not None
    assert blind.at_equal_size is not None
    assert telling.at_equal_size > 0.9
    assert abs(blind.at_equal_size) < 0.4
    assert agreement("few", [(0.5, 3.0, 3.0)] * 3) is None


def test_a_profile_holds_every_layer_by_type_and_depth() -> None:
    allocator = make_allocator()
    front = points({"a": allocator.closed_form(0.4), "b": allocator.closed_form(0.9)})
    found = profile(front, allocator.space)
    assert [(s.group, s.depth) for s in found.layers] == [(g, d) for g in ("attn", "mlp") for d in range(3)]
    assert np.array(found.kept).shape == (6, 2)
    last = allocator.space["block.2.mlp"]
    assert found.kept[5][0] == last.params(front[0].rank_map.get(last.name)) / last.dense_params


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study in whose losses attention counts twice what the closed form takes it for."""
    url = f"sqlite:///{tmp_path_factory.mktemp('insight')}/s.db"
    allocator = make_allocator(layers=4)
    spec = make_spec(ladder=[0.9, 0.7, 0.5, 0.35], seeds=["closed-form"], multiplier_range=2.0)
    study = Study.open(spec, url, allocator, make_facts(allocator))
    study.set_dense_loss(3.0)
    for _ in range(40):
        proposal = study.ask()
        rise = allocator.predicted_rise(proposal.rank_map)
        attention = RankMap({n: r for n, r in proposal.rank_map.items() if n.endswith("attn")})
        loss = 3.0 + rise + 4 * allocator.predicted_rise(attention)
        study.tell(proposal, measure(proposal.rank_map, loss, Fidelity.TUNED, allocator))
    study.close()
    return url


def test_trials_are_compared_with_those_of_their_size_wherever_the_ladder_ends() -> None:
    allocator = make_allocator(layers=4)
    points = []
    for number, kept in enumerate(np.linspace(0.3, 0.95, 24)):
        rank_map = allocator.closed_form(float(kept))
        exact = allocator.space.kept_of_targets(rank_map)
        loss = 3 + (1 - exact) ** 2 + (0.1 if number in (0, 12) else 0.0)
        points.append(FrontPoint(number, rank_map, measure(rank_map, loss, allocator=allocator), "fitted"))
    above = above_others(points)
    assert len(above) == 24
    assert sorted(above, key=above.__getitem__)[-2:] in ([0, 12], [12, 0])
    assert above_others([]) == {}


def test_a_study_explains_itself(database: str) -> None:
    found = api.explain("tiny", storage=database)
    assert found.trials == 40
    change = {g: sum(t.difference for t in found.tendencies if t.group == g) for g in ("attn", "mlp")}
    assert change["attn"] > 0 > change["mlp"]
    # What the sampler never varies, as the default leaves the blend with uniform ranks, has no part in it.
    assert set(found.importances) == {"u.attn", "u.mlp", "u.depth.linear", "u.depth.quadratic"}
    assert sum(found.importances.values()) == pytest.approx(1)
    assert [a.label for a in found.agreements] == ["predicted"]
    assert found.agreements[0].spearman > 0.7
    assert len(found.profile.trials) == len(Front.of(api.view("tiny", storage=database).points))


def test_the_command_prints_text_json_and_a_picture(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["explain", "tiny", "--storage", database, "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "attn  first  third  front 0." in out
    assert "u.attn" in out
    assert f"wrote {tmp_path}/a.png" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert run_command(["explain", "tiny", "--storage", database, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["study"] == "tiny"
    assert told["agreements"][0]["label"] == "predicted"


def test_a_study_without_measurements_has_nothing_to_explain(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    allocator = make_allocator()
    Study.open(make_spec(), url, allocator, make_facts(allocator)).close()
    with pytest.raises(InputError, match="no trial has ended that meets the study's goals"):
        api.explain("tiny", storage=url)


def test_a_picture_needs_neither_closed_form_nor_multipliers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    allocator = make_allocator()
    spec = make_spec(ladder=[0.7], seeds=["uniform"], space="direct", sampler="random")
    study = Study.open(spec, url, allocator, make_facts(allocator))
    for _ in range(3):
        proposal = study.ask()
        study.tell(proposal, measure(proposal.rank_map))
    study.close()
    found = api.explain("tiny", storage=url)
    assert (found.tendencies, dict(found.importances), found.agreements) == ((), {}, ())
    assert insight_figure(found).get_axes()
