"""The rank map file: what it says, that it survives a round trip, and that it is checked."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rank_search import atomic
from rank_search.data.sources import Source
from rank_search.errors import RankMapError
from rank_search.export.rank_map_file import RankMapFile, json_schema
from rank_search.measurement import Fidelity, Measurement
from rank_search.ranks import LayerShape, RankMap, RankSpace
from rank_search.spec import DataSpec, ModelSpec, RunSpec, SearchSpec, StudySpec

SHAPES = (
    LayerShape("blocks.0.q", 8, 8),
    LayerShape("blocks.0.up", 16, 8),
    LayerShape("blocks.1.q", 8, 8),
)
SPACE = RankSpace(SHAPES, model_params=400)
RANKS = RankMap({"blocks.0.q": 2, "blocks.0.up": 5})
RECIPE = StudySpec(
    name="small",
    model=ModelSpec(source="owner/model"),
    data=DataSpec(train="python-docs", validation="book.txt"),
    search=SearchSpec(ladder=(0.9, 0.5)),
    run=RunSpec(work_dir="work"),
)
SCHEMA = Path(__file__).parents[2] / "docs" / "rank_map.schema.json"


def measurement(loss: float = 3.25) -> Measurement:
    return Measurement(
        loss=loss,
        standard_error=0.01,
        num_params=SPACE.num_params(RANKS),
        target_params=SPACE.target_params(RANKS),
        kept_of_targets=SPACE.kept_of_targets(RANKS),
        kept_of_model=SPACE.kept_of_model(RANKS),
        fidelity=Fidelity.TUNED,
        tokens=1000,
        finetune_seconds=1.5,
        peak_memory=1 << 30,
    )


def example(**fields: Any) -> RankMapFile:
    given: dict[str, Any] = {
        "weights_digest": "ab" * 32,
        "allocation": "trial 17 (tpe)",
        "revision": "c0ffee",
        "measurement": measurement(),
        "trial": 17,
        "calibration_digest": "cd" * 32,
        "bank_digest": "ef" * 32,
    }
    return RankMapFile.of(RANKS, SPACE, RECIPE, **(given | fields))


def changed(tmp_path: Path, change: Any) -> Path:
    """The example's file after ``change`` was made to its JSON."""
    path = tmp_path / "rank_map.json"
    example().write(path, folder=tmp_path)
    tables = json.loads(path.read_text())
    change(tables)
    path.write_text(json.dumps(tables))
    return path


# --- contents


@pytest.mark.parametrize("fields", [{}, {"measurement": None, "trial": None, "allocation": "closed form 0.6"}])
def test_a_file_reads_back_as_it_was_written(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "rank_map.json"
    written = example(**fields)
    written.write(path, folder=tmp_path)
    read = RankMapFile.read(path)
    assert read == written
    assert read.rank_map == RANKS
    assert read.spec == RECIPE
    if read.measurement is not None:
        assert read.measurement.measurement() == measurement()


def test_counts_are_those_of_the_storage_form() -> None:
    file = example()
    # Two factors: 2 · 16 and 5 · 24 numbers and one dense 8 × 8 layer, of 256; 144 parameters are elsewhere.
    assert file.kept_of_targets == (32 + 120 + 64) / 256
    assert file.num_params == 144 + 216
    assert file.kept_of_model == 360 / 400
    pivoted = RankMapFile.of(RANKS, SPACE.with_storage("pivoted"), RECIPE, weights_digest="x", allocation="by hand")
    assert pivoted.num_params == 144 + 2 * 14 + 5 * 19 + 64
    assert file.num_params_otherwise == ("pivoted", pivoted.num_params)
    assert pivoted.num_params_otherwise == ("two-factor", file.num_params)


def test_all_target_layers_are_listed_and_dense_ones_have_no_rank(tmp_path: Path) -> None:
    example().write(tmp_path / "rank_map.json", folder=tmp_path)
    text = (tmp_path / "rank_map.json").read_text()
    tables = json.loads(text)
    assert tables["layers"] == {"blocks.0.q": [8, 8], "blocks.0.up": [16, 8], "blocks.1.q": [8, 8]}
    assert tables["ranks"] == {"blocks.0.q": 2, "blocks.0.up": 5}
    assert '"blocks.0.up": [16, 8]' in text


def test_a_rank_map_outside_its_space_makes_no_file() -> None:
    with pytest.raises(RankMapError, match=r"blocks\.1\.q has rank 4"):
        RankMapFile.of(RankMap({"blocks.1.q": 4}), SPACE, RECIPE, weights_digest="x", allocation="by hand")


# --- relative paths


def test_a_file_of_an_earlier_version_means_what_it_meant_then(tmp_path: Path) -> None:
    tables = json.loads(example().text())
    for later in ("slope_power", "gain_step"):
        del tables["recipe"]["factors"][later]
    tables["recipe"]["finetune"] |= {"mode": "nested", "train": "all"}  # allowed then
    (tmp_path / "map.json").write_text(json.dumps(tables), encoding="utf-8")
    recipe = RankMapFile.read(tmp_path / "map.json").recipe
    assert (recipe.factors.slope_power, recipe.factors.gain_step) == (0.0, 0.0)
    assert recipe.factors.anchor == RECIPE.factors.anchor
    assert recipe.finetune.train == "all"
    tables["recipe"]["factors"] = None
    (tmp_path / "map.json").write_text(json.dumps(tables), encoding="utf-8")
    with pytest.raises(RankMapError, match=r"recipe\.factors"):
        RankMapFile.read(tmp_path / "map.json")


def test_local_paths_lead_to_the_same_files_from_the_files_own_folder(tmp_path: Path) -> None:
    study, out = tmp_path / "studies" / "one", tmp_path / "out"
    for folder in (study / "model", out):
        folder.mkdir(parents=True)
    (study / "book.txt").write_text("words")
    recipe = RECIPE.model_copy(
        update={
            "model": ModelSpec(source="model"),
            "data": DataSpec(train="owner/corpus", validation="book.txt", test=str(study / "book.txt")),
        }
    )
    RankMapFile.of(RANKS, SPACE, recipe, weights_digest="x", allocation="by hand").write(
        out / "rank_map.json", folder=study
    )
    read = RankMapFile.read(out / "rank_map.json")
    assert read.model.source == read.spec.model.source == "../studies/one/model"
    assert read.spec.run.work_dir == "../studies/one/work"
    assert read.spec.data.train == "owner/corpus"
    assert read.spec.data.test == str(study / "book.txt")
    source = Source.of(read.spec.data, "validation", out)
    assert source is not None
    assert source.path is not None
    assert source.path.read_text() == "words"


def test_paths_hold_when_the_file_is_reached_through_a_link(tmp_path: Path) -> None:
    study, real = tmp_path / "study", tmp_path / "deep" / "down" / "out"
    (study / "model").mkdir(parents=True)
    real.mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    recipe = RECIPE.model_copy(update={"model": ModelSpec(source="model")})
    file = RankMapFile.of(RANKS, SPACE, recipe, weights_digest="x", allocation="by hand")
    file.write(tmp_path / "out" / "rank_map.json", folder=study)
    source = RankMapFile.read(real / "rank_map.json").model.source
    assert (tmp_path / "out" / source).samefile(study / "model")


def test_names_stay_as_they_are_beside_the_study_file(tmp_path: Path) -> None:
    example().write(tmp_path / "rank_map.json", folder=tmp_path)
    assert RankMapFile.read(tmp_path / "rank_map.json").spec == RECIPE


# --- writing


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank_map.json"
    path.write_text("the older file")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(RankMapError, match=r"rank_map\.json cannot be written: No space left on device"):
        example().write(path, folder=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["rank_map.json"]
    assert path.read_text() == "the older file"


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankMapError, match="cannot be written: No such file or directory"):
        example().write(tmp_path / "nowhere" / "rank_map.json", folder=tmp_path)


def test_others_may_read_the_file_as_far_as_the_umask_allows(tmp_path: Path) -> None:
    example().write(tmp_path / "rank_map.json", folder=tmp_path)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("rank_map.json", "plain")}
    assert len(modes) == 1


# --- reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "one JSON object, not a list"),
        (b"{}", "schema_version must be 1, not None"),
        (b'{"schema_version": 2}', "schema_version must be 1, not 2"),
        (b'{"schema_version": 1}', "field model is missing"),
    ],
)
def test_what_is_no_rank_map_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "rank_map.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RankMapError, match=message) as refusal:
        RankMapFile.read(path)
    assert "\n" not in str(refusal.value)
    assert "rank_map.json" in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["ranks"].update({"blocks.0.q": 0}), r"ranks\.blocks\.0\.q: .* not 0"),
        (lambda t: t["ranks"].update({"blocks.0.q": 2.5}), r"ranks\.blocks\.0\.q: .* not 2\.5"),
        (lambda t: t["ranks"].update({"blocks.0.q": 3}), "ranks, which were changed"),
        (lambda t: t["ranks"].update({"blocks.9.q": 3}), r"ranks\.blocks\.9\.q is not among the target layers"),
        (lambda t: t["layers"].update({"blocks.0.q": [8]}), r"layers\.blocks\.0\.q\.1 is missing"),
        (lambda t: t.update(storage="sparse"), "storage: .* not 'sparse'"),
        (lambda t: t.update(kept_of_targets=1.5), "kept_of_targets: .* not 1.5"),
        (lambda t: t.update(colour="red"), "unknown field colour"),
        (lambda t: t["model"].pop("weights_digest"), r"field model\.weights_digest is missing"),
        (lambda t: t["measurement"].update(fidelity="guessed"), r"measurement\.fidelity: .* not 'guessed'"),
        (lambda t: t["measurement"].update(loss="low"), r"measurement\.loss: .* not 'low'"),
        (lambda t: t["measurement"].update(loss=float("nan")), r"measurement\.loss"),
        (lambda t: t["recipe"]["search"].update(trails=3), r"unknown field recipe\.search\.trails"),
    ],
)
def test_a_field_against_the_schema_is_named(tmp_path: Path, change: Any, message: str) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(RankMapError, match=message) as refusal:
        RankMapFile.read(path)
    assert "\n" not in str(refusal.value)


# --- fitting


def test_it_fits_the_model_it_was_made_for_and_one_with_more_layers() -> None:
    example().check_fits(SHAPES, "ab" * 32)
    example().check_fits([*reversed(SHAPES), LayerShape("head", 100, 8)])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES[:1], r"^blocks\.0\.up is in the rank map but not in this model"),
        ((), r"^blocks\.0\.q is in the rank map but not in this model"),
        (
            (SHAPES[0], LayerShape("blocks.0.up", 8, 16), SHAPES[2]),
            r"^blocks\.0\.up is \(16, 8\) in the rank map but \(8, 16\) in this model",
        ),
        ((*SHAPES[:2], LayerShape("blocks.1.q", 8, 4)), r"^blocks\.1\.q is \(8, 8\)"),
    ],
)
def test_the_first_module_that_does_not_fit_is_named(shapes: tuple[LayerShape, ...], message: str) -> None:
    with pytest.raises(RankMapError, match=message):
        example().check_fits(shapes, "other weights")


def test_a_rank_above_what_its_storage_form_pays_for_does_not_fit() -> None:
    ranks = RankMap({"blocks.0.q": 5})
    pivoted = RankMapFile.of(ranks, SPACE.with_storage("pivoted"), RECIPE, weights_digest="x", allocation="by hand")
    pivoted.check_fits(SHAPES)
    two_factor = pivoted.model_copy(update={"storage": "two-factor"})
    with pytest.raises(
        RankMapError, match=r"^blocks\.0\.q has rank 5, but above 3 its \(8, 8\) matrix is smaller dense"
    ):
        two_factor.check_fits(SHAPES)


def test_other_weights_of_the_same_shapes_do_not_fit() -> None:
    with pytest.raises(RankMapError, match=r"made for weights abababababab.*use owner/model at revision c0ffee"):
        example().check_fits(SHAPES, "12" * 32)


# --- schema


def test_the_published_schema_is_the_schema_of_the_code() -> None:
    assert json.loads(SCHEMA.read_text()) == json_schema()


def test_written_files_are_valid_under_the_published_schema(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for file in (example(), example(measurement=None, trial=None, bank_digest=None)):
        file.write(tmp_path / "rank_map.json", folder=tmp_path)
        validator.validate(json.loads((tmp_path / "rank_map.json").read_text()))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("schema_version"),
        lambda t: t.update(schema_version=2),
        lambda t: t["ranks"].update({"blocks.0.q": 0}),
        lambda t: t["layers"].update({"blocks.0.q": [8, 8, 8]}),
        lambda t: t.update(colour="red"),
    ],
)
def test_the_published_schema_refuses_what_reading_refuses(tmp_path: Path, change: Any) -> None:
    path = changed(tmp_path, change)
    assert not jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).is_valid(json.loads(path.read_text()))
    with pytest.raises(RankMapError):
        RankMapFile.read(path)
