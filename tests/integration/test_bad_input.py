"""Bad input gets one line that names the value and the way out, exit code 2, and changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.data.disks import disk_full_at

from .conftest import MakeStudy, rank_search


def _tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content, but for the working folder's locks and whole token blocks.

    A text must be cut into blocks to be counted, and what was cut once serves the mended study.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.suffix != ".lock" and not (path.parent.name == "blocks" and path.suffix == ".npy")
    }


def refused(folder: Path, *arguments: str | Path, says: tuple[str, ...]) -> str:
    """Run a command that must be refused, with every part of ``says`` in its one line; ``folder`` stays as it is."""
    before = _tree(folder)
    result = rank_search(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("rank-search: error: ")
    assert result.err.endswith("\n")
    assert result.err.count("\n") == 1
    for part in says:
        assert part in result.err
    assert _tree(folder) == before
    return result.err


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, make_study: MakeStudy) -> Path:
    """The folder of a study with one trial."""
    folder = tmp_path_factory.mktemp("searched")
    assert rank_search("run", make_study(folder), "--trials", "1").code == 0
    assert rank_search("export", folder / "study.toml", "--knee", "-o", folder / "rank_map.json").code == 0
    return folder


BAD_STUDIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"data__sequence_lenght": 32}, ("data.sequence_lenght", "did you mean 'sequence_length'?")),
    "unknown sampler": ({"search__sampler": "grid"}, ("search.sampler", "'grid'", "'tpe'")),
    "wrong type": ({"search__trials": "many"}, ("search.trials", "'many'")),
    "no trials": ({"search__trials": 0}, ("search.trials", "greater than or equal to 1", "0")),
    "ladder above 1": ({"search__ladder": [1.5]}, ("search.ladder", "less than or equal to 1", "1.5")),
    "ladder below the smallest ranks": ({"search__ladder": [0.001]}, ("search.ladder holds 0.001", "change one of")),
    "ladder below the smallest ranks, direct": (
        {"search__ladder": [0.001], "search__space": "direct", "search__sampler": "tpe"},
        ("0.001", "keep at least"),
    ),
    "fewer parameters than there can be": ({"search__max_params": 1}, ("search.max_params is 1,", "raise it")),
    "fewer parameters than there can be, direct": (
        {"search__max_params": 1000, "search__space": "direct", "search__sampler": "random"},
        ("search.max_params is 1,000,", "raise it"),
    ),
    "multiples beyond the range": (
        {"targets__rank_multiple": 1000},
        ("search.max_kept is 0.95", "targets.rank_multiple", "change one of them"),
    ),
    "ladder outside the range": ({"search__min_kept": 0.6}, ("ladder holds 0.5", "outside", "change one of them")),
    "sampler that does not suit": (
        {"search__sampler": "gp", "search__space": "direct"},
        ("'gp'", "take space = 'multipliers'"),
    ),
    "min above max": ({"search__min_kept": 0.96}, ("min_kept (0.96)", "max_kept (0.95)")),
    "no such model": ({"model__source": "./missing"}, ("'./missing'", "give a model folder")),
    "model of another kind": ({"model__source": "text.txt"}, ("'text.txt'", "give a model folder")),
    "pattern without a layer": ({"targets__include": ["*.nothing"]}, ("'*.nothing'", "rank-search layers MODEL")),
    "pattern of no linear layer": ({"targets__include": ["model.norm"]}, ("'model.norm'", "no linear layer")),
    "no target layer left": ({"targets__exclude": ["*_proj"]}, ("no target layer is selected", "targets.include")),
    "no such text": ({"data__train": "missing.txt"}, ("missing.txt", "no such file")),
    "empty text": ({"data__train": "empty.txt"}, ("empty.txt", "empty")),
    "text of less than a block": ({"data__train": "short.txt"}, ("short.txt", "fewer than one block of 32")),
    "text too short": ({"data__calibration_blocks": 5000}, ("text.txt", "5000 calibration", "name a longer text")),
    "no such column": ({"data__train": "rows.jsonl", "data__column": "body"}, ("rows.jsonl", "'body'")),
    "validation is train": ({"data__validation": "text.txt"}, ("validation", "train", "text.txt")),
    "test is train": ({"data__test": "text.txt"}, ("data.test", "data.train", "text.txt", "name a text that")),
    "test is a copy of train": ({"data__test": "copy.txt"}, ("data.test", "data.train", "copy.txt", "same text")),
    "no such test text": ({"data__test": "missing.txt"}, ("missing.txt", "no such file")),
    "sequence too long": ({"data__sequence_length": 65}, ("at most 64 tokens", "not 65", "data.sequence_length")),
    "no such device": ({"run__device": "cuda:99"}, ("'cuda:99'", "use 'auto' or 'cpu'")),
    "device of no kind": ({"run__device": "tpu"}, ("run.device", "'tpu'")),
}


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_study_file(tmp_path: Path, make_study: MakeStudy, case: str) -> None:
    changes, says = BAD_STUDIES[case]
    study = make_study(tmp_path, **changes)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a row"}) + "\n")
    shutil.copy(tmp_path / "text.txt", tmp_path / "copy.txt")
    refused(tmp_path, "run", study, says=says)


@pytest.mark.parametrize("command", ["prepare", "allocate"])
def test_a_test_text_that_a_search_would_see(tmp_path: Path, make_study: MakeStudy, command: str) -> None:
    options = ["--kept", "0.5", "-o", tmp_path / "rank_map.json"] if command == "allocate" else []
    refused(tmp_path, command, make_study(tmp_path, data__test="text.txt"), *options, says=("data.test", "data.train"))


def test_missing_study_file(tmp_path: Path) -> None:
    for command in ("run", "prepare", "front", "status"):
        refused(tmp_path, command, tmp_path / "no.toml", says=("no.toml", "No such file"))


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"name = ", "not valid TOML"), (b"\xff\xfe", "not UTF-8"), (b'name = "x"', "model"), (b"", "name")],
)
def test_malformed_study_file(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    refused(tmp_path, "run", path, says=("study.toml", part))


@pytest.mark.parametrize(
    ("kept", "part"),
    [
        ("0", "(0, 1]"),
        ("1.5", "(0, 1]"),
        ("-0.2", "(0, 1]"),
        ("nan", "(0, 1]"),
        ("0.001", "keep at least"),
        ("half", "--kept"),
    ],
)
def test_kept_fraction(tmp_path: Path, make_study: MakeStudy, kept: str, part: str) -> None:
    study, out = make_study(tmp_path), tmp_path / "rank_map.json"
    refused(tmp_path, "allocate", study, "--kept", kept, "-o", out, says=(kept, part))


@pytest.mark.parametrize("command", ["run", "front", "status"])
def test_unreachable_database_hides_its_password(tmp_path: Path, make_study: MakeStudy, command: str) -> None:
    url = "postgresql://u:secret@127.0.0.1:1/x"
    line = refused(tmp_path, command, make_study(tmp_path), "--storage", url, says=("127.0.0.1:1/x", "--storage"))
    assert "secret" not in line


def test_storage_that_is_none(tmp_path: Path, make_study: MakeStudy) -> None:
    study = make_study(tmp_path)
    text = tmp_path / "text.txt"
    refused(tmp_path, "run", study, "--storage", "", says=("not a database URL",))
    refused(tmp_path, "run", study, "--storage", "nonsense", says=("not a database URL", "sqlite:///"))
    refused(tmp_path, "status", study, "--storage", f"sqlite:///{tmp_path}/no/x.db", says=("no/x.db", "--storage"))
    refused(tmp_path, "run", study, "--storage", f"sqlite:///{text}", says=("text.txt",))
    refused(tmp_path, "status", study, says=("tiny.db", "run the study first"))


def test_study_by_name(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK_SEARCH_STORAGE", raising=False)
    refused(searched, "status", "tiny", says=("--storage", "RANK_SEARCH_STORAGE"))
    url = f"sqlite:///{searched / 'tiny.db'}"
    refused(searched, "status", "tinny", "--storage", url, says=("'tinny'", "known studies are tiny"))


def test_study_resumed_with_another_meaning(searched: Path, tmp_path: Path, make_study: MakeStudy) -> None:
    shutil.copy(searched / "tiny.db", tmp_path)
    study = make_study(tmp_path, factors__method="svd")
    refused(tmp_path, "run", study, says=("factors.method", '"kfac"', '"svd"', "new name"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ("exactly one of", "0")),
        (["--knee", "--kept", "0.5"], ("exactly one of", "2")),
        (["--trial", "77"], ("77", "rank-search status")),
        (["--kept", "0.01"], ("0.01", "smallest keeps")),
        (["--kept", "2"], ("(0, 1]", "2")),
        (["--max-params", "5"], ("5", "smallest has")),
        (["--max-loss", "0.001"], ("0.001", "lowest is")),
    ],
)
def test_choice_of_export(searched: Path, arguments: list[str], says: tuple[str, ...]) -> None:
    refused(searched, "export", searched / "study.toml", *arguments, "-o", searched / "x.json", says=says)


def test_output_that_cannot_be_written(searched: Path) -> None:
    study, missing = searched / "study.toml", searched / "missing"
    says = ("missing", "does not exist", "make it")
    refused(searched, "export", study, "--knee", "-o", missing / "x.json", says=says)
    refused(searched, "allocate", study, "--kept", "0.8", "-o", missing / "x.json", says=says)
    refused(searched, "front", study, "--plot", missing / "x.png", says=says)
    refused(searched, "export", study, "--knee", "-o", searched, says=("is a folder", "name a file"))
    refused(searched, "front", study, "--plot", searched / "x.bmp", says=("x.bmp", ".png, .svg, .pdf"))
    refused(searched, "front", study, "--json", "--csv", says=("--json or --csv",))


def test_rank_map_of_another_model(searched: Path, tmp_path: Path, other_model_folder: Path) -> None:
    arguments = ("apply", searched / "rank_map.json", "-o", tmp_path / "out", "--model", other_model_folder)
    says = ("model.layers.0.self_attn.q_proj", "(32, 32)", "(16, 16)", "use the rank map of this model")
    refused(searched, *arguments, says=says)
    assert not (tmp_path / "out").exists()


def test_rank_map_of_other_weights(searched: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    """Of the same shapes: refused before a bank is built for them."""
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ("apply", searched / "rank_map.json", "-o", tmp_path / "out", "--model", other)
    refused(searched, *arguments, says=("was made for weights", "but this model has"))
    assert not (tmp_path / "out").exists()


def test_rank_map_file(searched: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad.json"
    table = json.loads((searched / "rank_map.json").read_text())
    refused(tmp_path, "apply", tmp_path / "no.json", "-o", out, says=("no.json", "No such file"))
    bad.write_text("{")
    refused(tmp_path, "apply", bad, "-o", out, says=("bad.json", "not JSON"))
    bad.write_text(json.dumps(table | {"schema_version": 99}))
    refused(tmp_path, "apply", bad, "-o", out, says=("schema_version", "99"))
    name = next(iter(table["ranks"]))
    bad.write_text(json.dumps(table | {"ranks": table["ranks"] | {name: 1}}))
    refused(tmp_path, "apply", bad, "-o", out, says=("digests.rank_map", "export the rank map anew"))


def test_apply_to_a_folder_in_the_way(searched: Path) -> None:
    refused(
        searched,
        "apply",
        searched / "rank_map.json",
        "-o",
        searched,
        says=(str(searched), "not empty", "another folder"),
    )
    under_a_file = searched / "text.txt" / "out"
    refused(searched, "apply", searched / "rank_map.json", "-o", under_a_file, says=("text.txt is a file",))
    arguments = ("apply", searched / "rank_map.json", "-o", searched / "out", "--device", "cuda:99")
    refused(searched, *arguments, says=("'cuda:99'", "use 'auto' or 'cpu'"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "missing.txt", "--sequence-length", "32"], ("missing.txt", "no such file", "current folder")),
        (["--data", "python-docs", "--sequence-length", "1"], ("--sequence-length", "2", "1")),
        (["--data", "python-docs", "--sequence-length", "65"], ("at most 64", "65", "lower --sequence-length")),
        (["--data", "python-docs", "--device", "cuda:99"], ("'cuda:99'", "'cpu'")),
        (["--data", "python-docs", "--device", "mps"], ("'mps'", "auto, cpu, cuda or cuda:N")),
        (["--data", "python-docs", "--blocks", "0"], ("--blocks", "'0'")),
        ([], ("--data", "rank-search evaluate --help")),
    ],
)
def test_evaluate(tmp_path: Path, tiny_model_folder: Path, arguments: list[str], says: tuple[str, ...]) -> None:
    refused(tmp_path, "evaluate", tiny_model_folder, *arguments, says=says)


def test_evaluate_on_a_study(tmp_path: Path, tiny_model_folder: Path, make_study: MakeStudy) -> None:
    study = make_study(tmp_path)
    for options, says in (
        (["--study", study], ("names no test text", "add data.test")),
        (["--study", study, "--data", "python-docs"], ("either --data", "or --study", "not both")),
        (["--study", study, "--sequence-length", "8"], ("--sequence-length", "the study file says it")),
        (["--study", tmp_path / "no.toml"], ("no.toml", "No such file")),
    ):
        refused(tmp_path, "evaluate", tiny_model_folder, *options, says=says)
    refused(
        tmp_path, "evaluate", tiny_model_folder, "--study", make_study(tmp_path, data__test="text.txt"),
        says=("data.test and data.train must not share text",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--include", "*.nothing"], ("'*.nothing'", "matches no module")),
        (["--share", "1.5"], ("--share", "1.5")),
        (["--layers", "all"], ("--layers", "'all'", "query-value")),
    ],
)
def test_layers(tmp_path: Path, tiny_model_folder: Path, arguments: list[str], says: tuple[str, ...]) -> None:
    refused(tmp_path, "layers", tiny_model_folder, *arguments, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frnt"], ("'frnt'", "'front'")),
        (["run"], ("STUDY.toml", "rank-search run --help")),
        (["run", "x.toml", "--trails", "3"], ("--trails", "--trials", "rank-search run --help")),
        (["run", "x.toml", "--trials", "many"], ("--trials", "'many'")),
        (["allocate", "x.toml", "-o", "x.json"], ("--kept",)),
        (["export", "x.toml", "--knee"], ("--output",)),
        (["layers", "./nowhere"], ("./nowhere", "give a model folder")),
    ],
)
def test_usage(tmp_path: Path, arguments: list[str], says: tuple[str, ...]) -> None:
    refused(tmp_path, *arguments, says=says)


def test_trials_below_one(tmp_path: Path, make_study: MakeStudy) -> None:
    refused(tmp_path, "run", make_study(tmp_path), "--trials", "0", says=("at least 1", "not 0"))


def test_full_disk_leaves_no_half_bank(tmp_path: Path, make_study: MakeStudy) -> None:
    study = make_study(tmp_path)
    with disk_full_at(40_000):
        result = rank_search("run", study)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "factor bank" in result.err
    assert "free space or choose another run.work_dir" in result.err
    assert [path.suffix for path in (tmp_path / "work" / "banks").iterdir()] == [".lock"]
    assert not (tmp_path / "tiny.db").exists()
    assert rank_search("run", study, "--trials", "1").code == 0


@pytest.mark.parametrize("command", ["pause", "resume", "stop"])
def test_what_is_asked_of_a_study_that_is_not_there(searched: Path, command: str) -> None:
    database = next(searched.rglob("*.db"))
    refused(searched, command, "nobody", "--storage", f"sqlite:///{database}", says=("'nobody'", "known are tiny"))
    refused(searched, command, "nobody", says=("no database is named", "--storage URL"))
    refused(searched, command, "nobody", "--storage", f"sqlite:///{searched}/no.db", says=("no database", "no.db"))
    refused(searched, command, searched / "no.toml", says=("no.toml", "No such file"))


@pytest.mark.parametrize("arguments", [["list"], ["revoke", "ci"]])
def test_tokens_of_a_service_that_is_not_there(tmp_path: Path, arguments: list[str]) -> None:
    folder = tmp_path / "service"
    refused(tmp_path, "token", *arguments, "--folder", folder, says=("there is no database", "studies.db"))
    assert not folder.exists()


def test_tokens_that_cannot_be(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    assert rank_search("token", "create", "ci", "--storage", storage).code == 0
    refused(tmp_path, "token", "create", "ci", "--storage", storage, says=("'ci'", "already"))
    refused(tmp_path, "token", "create", "a b", "--storage", storage, says=("'a b'", "letters"))
    refused(tmp_path, "token", "create", "a", "--role", "admin", "--storage", storage, says=("'admin'", "read, write"))
    refused(tmp_path, "token", "revoke", "cd", "--storage", storage, says=("'cd'", "token list"))


@pytest.mark.parametrize(
    "arguments", [["token", "create", "ci"], ["token", "list"], ["serve", "--port", "0"], ["jobs"]]
)
def test_a_secret_that_cannot_be_read_is_not_replaced_by_another_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("RANK_SEARCH_STORAGE_FILE", str(tmp_path / "secret"))
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, *arguments, says=("RANK_SEARCH_STORAGE_FILE", "secret", "No such file"))
    assert list(tmp_path.iterdir()) == []


def test_jobs_of_a_database_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, "jobs", says=("no database is named", "--storage URL"))
    refused(tmp_path, "jobs", "--storage", f"sqlite:///{tmp_path}/no.db", says=("no database", "no.db"))
