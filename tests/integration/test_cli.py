"""The commands from end to end on a tiny model: what they print, write and return."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from rank_search import api, applying
from rank_search.cli import tables
from rank_search.cli.progress import TerminalProgress, duration
from rank_search.errors import RankMapError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.spec import StudyFile
from rank_search.trial import Evaluator

from .conftest import MakeStudy, Result, rank_search


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, make_study: MakeStudy) -> tuple[Path, Result]:
    """A study that was run, and what the run wrote."""
    study = make_study(tmp_path_factory.mktemp("searched"))
    return study, rank_search("run", study)


@pytest.fixture(scope="module")
def study(searched: tuple[Path, Result]) -> Path:
    return searched[0]


def test_run_prints_a_line_a_trial_and_the_front(searched: tuple[Path, Result]) -> None:
    study, result = searched
    assert result.code == 0
    assert result.err == ""  # no terminal: no bars, and no other library's lines
    numbered = [line.split()[0] for line in result.out.splitlines() if line[:5].strip().isdigit()]
    assert numbered[:6] == ["0", "1", "2", "3", "4", "5"]
    on_front = {str(point.trial) for point in api.front(study)}
    marked = {line.split()[0] for line in result.out.splitlines() if line.endswith("  front")}
    assert on_front <= marked
    assert set(numbered[6:]) == on_front
    assert result.out.startswith("study tiny, 6 trials wanted\n")
    assert "dense model" in result.out
    assert f"rank-search export {study} --knee -o rank_map.json" in result.out


def test_run_again_finds_the_study_done(study: Path) -> None:
    again = rank_search("run", study)
    assert again.code == 0
    assert "has its 6 trials already" in again.out
    assert api.status(study).finished == 6


def test_a_run_that_another_rule_stops_promises_no_more_trials(tmp_path: Path, make_study: MakeStudy) -> None:
    study = make_study(tmp_path, search__trials=4, search__gpu_seconds=1e-6)
    assert rank_search("run", study).code == 0
    again = rank_search("run", study)
    assert "Stopped because measurements have taken" in again.out
    assert "already" not in again.out


def test_a_front_that_no_trial_reaches_is_told_as_one(tmp_path: Path, make_study: MakeStudy) -> None:
    study = make_study(tmp_path, search__trials=2, search__max_loss=0.01)
    told = rank_search("run", study)
    assert told.code == 0
    assert f"No trial meets the study's goals: rank-search status {study}" in told.out
    assert "--plot" not in told.out
    for command in (["front", study, "--plot", tmp_path / "f.png"], ["explain", study],
                    ["export", study, "--knee", "-o", tmp_path / "r.json"]):  # fmt: skip
        refused = rank_search(*command)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "no trial has ended that meets the study's goals" in refused.err
    assert not {"f.png", "r.json"} & {path.name for path in tmp_path.iterdir()}


def test_run_with_trials_goes_on(tmp_path: Path, make_study: MakeStudy) -> None:
    study = make_study(tmp_path)
    database = f"sqlite:///{tmp_path / 'other.db'}"
    assert rank_search("run", study, "--trials", "1", "--storage", database).code == 0
    assert rank_search("run", study, "--trials", "2", "--storage", database).code == 0
    assert api.status("tiny", storage=database).finished == 2
    assert not (tmp_path / "tiny.db").exists()


def test_interrupted_run_exits_with_130_and_resumes(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, search__trials=4)
    measure = Evaluator.measure
    calls: list[Any] = []

    def interrupted_at_second(self: Evaluator, rank_map: Any, *rest: Any) -> Any:
        calls.append(rank_map)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, rank_map, *rest)

    monkeypatch.setattr(Evaluator, "measure", interrupted_at_second)
    stopped = rank_search("run", study)
    assert stopped.code == 130
    assert stopped.err == "rank-search: interrupted; what is done is kept, and the same command resumes\n"
    assert rank_search("run", study).code == 0
    assert calls[1] in calls[2:]
    status = rank_search("status", study).out
    assert "4 of 4 trials finished (4 complete, 1 requeued)" in status


def test_failed_trials_are_shown_with_their_reasons(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rank_search.errors import NonFiniteLossError

    study = make_study(tmp_path, search__trials=9)

    def fail(*_arguments: Any) -> None:
        raise NonFiniteLossError("training loss is nan at step 1 of 1")

    monkeypatch.setattr(Evaluator, "measure", fail)
    result = rank_search("run", study)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "3 trials in a row failed" in result.err
    assert result.out.count("failed: training loss is nan at step 1 of 1") == 3
    status = rank_search("status", study).out
    assert "trial 2 failed: training loss is nan at step 1 of 1" in status
    assert "lowest loss    not known yet" in status
    empty = rank_search("front", study)
    assert empty.code == 0
    assert "0 points on the front" in empty.out


def test_a_defect_is_not_swallowed(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "status", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rank_search("status", study)


def test_front_as_json_and_csv_is_nothing_else(study: Path) -> None:
    front = api.front(study)
    rows = json.loads(rank_search("front", study, "--json").out)
    assert [(row["trial"], row["num_params"], row["loss"]) for row in rows] == [
        (point.trial, point.num_params, point.loss) for point in front
    ]
    table = list(csv.DictReader(io.StringIO(rank_search("front", study, "--csv").out)))
    assert [int(row["trial"]) for row in table] == [point.trial for point in front]


def test_front_by_name_from_the_environment(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_SEARCH_STORAGE", f"sqlite:///{study.parent / 'tiny.db'}")
    assert rank_search("front", "tiny").out == rank_search("front", study).out


def test_piped_front_holds_every_column_and_no_escape(study: Path) -> None:
    out = rank_search("front", study).out
    for column in ("trial", "source", "parameters", "targets", "model", "loss", "perplexity", "fidelity"):
        assert column in out
    assert "\x1b" not in out
    assert "…" not in out
    point = api.front(study)[0]
    line = next(line for line in out.splitlines() if line.split()[:1] == [str(point.trial)])
    assert f"{point.num_params:,}" in line
    assert f"{point.loss:.4f} ± {point.measurement.standard_error:.4f}" in line
    assert line.rstrip().endswith("tuned")


def test_narrow_terminal_leaves_columns_out_and_cuts_no_number(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(tables, "_console", lambda: Console(file=out, width=80))
    tables.print_front(api.view(study))
    assert "…" not in out.getvalue()
    assert "fidelity" not in out.getvalue()
    assert "perplexity" in out.getvalue()


def test_front_plot_writes_a_picture(study: Path, tmp_path: Path) -> None:
    picture = tmp_path / "front.png"
    assert rank_search("front", study, "--plot", picture).code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_status_as_json(study: Path) -> None:
    record = json.loads(rank_search("status", study, "--json").out)
    assert (record["wanted"], record["finished"], record["complete"]) == (6, 6, 6)
    assert record["dense_loss"] == api.status(study).dense_loss


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        (["--knee"], lambda front: front.knee()),
        (["--kept", "0.6"], lambda front: front.at_most_kept(0.6)),
        (["--max-params", "30000"], lambda front: front.at_most_params(30000)),
        (["--max-loss", "9"], lambda front: front.at_most_loss(9)),
    ],
)
def test_export_writes_the_chosen_rank_map(
    study: Path, tmp_path: Path, choice: list[str], chosen: Callable[[Any], Any]
) -> None:
    path = tmp_path / "rank_map.json"
    result = rank_search("export", study, *choice, "-o", path)
    assert result.code == 0
    file, point = RankMapFile.read(path), chosen(api.front(study))
    assert file.rank_map == point.rank_map
    assert file.study.trial == point.trial
    assert f"{point.num_params:,} parameters" in result.out
    assert f"loss {point.loss:.4f}" in result.out


def test_export_of_a_trial_off_the_front(study: Path, tmp_path: Path) -> None:
    path = tmp_path / "rank_map.json"
    assert rank_search("export", study, "--trial", "2", "-o", path).code == 0
    assert RankMapFile.read(path).allocation == "trial 2 (uniform 0.8)"


def test_allocate_is_the_seed_of_the_search(study: Path, tmp_path: Path) -> None:
    closed, uniform = tmp_path / "closed.json", tmp_path / "uniform.json"
    assert rank_search("allocate", study, "--kept", "0.8", "-o", closed).code == 0
    assert rank_search("allocate", study, "--kept", "0.8", "--uniform", "-o", uniform).code == 0
    measured = {point.source: point.rank_map for point in api.view(study).points}
    assert RankMapFile.read(closed).rank_map == measured["closed form 0.8"]
    assert RankMapFile.read(uniform).rank_map == measured["uniform 0.8"]


def test_prepare_builds_the_bank_once(tmp_path: Path, make_study: MakeStudy) -> None:
    study = make_study(tmp_path)
    first, second = rank_search("prepare", study), rank_search("prepare", study)
    assert "14 target layers" in first.out
    assert "built in" in first.out
    assert "was there already" in second.out
    assert len(list((tmp_path / "work" / "banks").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_apply_writes_the_measured_model(study: Path, tmp_path: Path, form: str) -> None:
    rank_map, folder = tmp_path / "rank_map.json", tmp_path / "compressed"
    assert rank_search("export", study, "--kept", "0.5", "-o", rank_map).code == 0
    result = rank_search("apply", rank_map, "-o", folder, "--form", form, "--device", "cpu")
    assert result.code == 0
    measured = RankMapFile.read(rank_map).measurement
    assert measured is not None
    assert result.out.count(f"{measured.loss:.4f} ± {measured.standard_error:.4f}") == 2
    assert ("trust_remote_code=True" in result.out) == (form == "factored")
    scored = rank_search(
        "evaluate", folder, "--data", study.parent / "text.txt", "--sequence-length", "32", "--device", "cpu", "--json"
    )
    found = json.loads(scored.out)
    dense = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(api.view(study).record.spec.model.source).parameters()
    )
    assert found["num_params"] == (measured.num_params if form == "factored" else dense)
    assert found["tokens"] > 0


def test_apply_takes_the_commit_that_was_measured_and_uploads_nothing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study file may name a branch, which has moved on since, and a place for banks that is somebody else's."""
    file = api.export(study, knee=True)
    recipe = file.recipe.model_copy(
        update={
            "model": file.recipe.model.model_copy(update={"revision": "main"}),
            "run": file.recipe.run.model_copy(update={"bank_url": "s3://elsewhere"}),
        }
    )
    record = file.model.model_copy(update={"revision": "c0ffee"})
    file.model_copy(update={"model": record, "recipe": recipe}).write(tmp_path / "rank_map.json", folder=study.parent)
    asked = []

    def refuse(study: StudyFile, **_arguments: object) -> None:
        asked.append((study.spec.model.revision, study.spec.run.bank_url))
        raise RankMapError("far enough")

    monkeypatch.setattr(applying, "prepare", refuse)
    with pytest.raises(RankMapError, match="far enough"):
        api.apply(tmp_path / "rank_map.json", tmp_path / "compressed")
    assert asked == [("c0ffee", None)]


def test_evaluate_scores_on_the_test_blocks_of_a_study(
    tmp_path: Path, tiny_model_folder: Path, make_study: MakeStudy
) -> None:
    study = make_study(tmp_path, data__test="test.csv", data__column="body", data__test_blocks=3)
    body = "another text than the one of the search " * 20
    (tmp_path / "test.csv").write_text(f"body\n{body}\n")
    (tmp_path / "body.txt").write_text(body)
    on_study = rank_search("evaluate", tiny_model_folder, "--study", study, "--device", "cpu", "--json")
    on_text = rank_search(
        "evaluate", tiny_model_folder, "--data", tmp_path / "body.txt", "--sequence-length", "32", "--blocks", "3",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert (on_study.code, on_study.err) == (0, "")
    assert json.loads(on_study.out) == json.loads(on_text.out)
    assert json.loads(on_study.out)["tokens"] == 3 * 31
    fewer = rank_search("evaluate", tiny_model_folder, "--study", study, "--blocks", "2", "--device", "cpu", "--json")
    assert json.loads(fewer.out)["tokens"] == 2 * 31


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path, make_study: MakeStudy, tiny_model_folder: Path) -> None:
    """In a process of its own, for the hub's address is read when its client is loaded; nothing listens on port 9."""
    run = ["run", make_study(tmp_path, model__source="owner/model")]
    evaluate = ["evaluate", tiny_model_folder, "--data", "owner/corpus", "--sequence-length", "32", "--device", "cpu"]
    code = (
        "import json, sys, time; time.sleep = lambda _seconds: None\n"
        "from rank_search.cli import run_command; print([run_command(line) for line in json.loads(sys.argv[1])])"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_VERBOSITY", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([run, evaluate], default=str)], env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[2, 2]\n"
    of_model, of_text = done.stderr.splitlines()
    assert of_model.startswith("rank-search: error: model 'owner/model' cannot be loaded: ")
    assert "; nor is it a folder here (" in of_model
    assert of_text.startswith("rank-search: error: text owner/corpus (split test): ")


def test_evaluate_prints_loss_and_parameters(study: Path, tiny_model_folder: Path) -> None:
    text = study.parent / "text.txt"
    arguments = (
        "evaluate",
        tiny_model_folder,
        "--data",
        text,
        "--sequence-length",
        "32",
        "--blocks",
        "4",
        "--device",
        "cpu",
    )
    printed, found = rank_search(*arguments).out, json.loads(rank_search(*arguments, "--json").out)
    assert found["tokens"] == 4 * 31
    assert f"loss {found['loss']:.4f} ± {found['standard_error']:.4f}" in printed
    assert f"{found['num_params']:,} parameters" in printed


def test_layers_lists_shapes_and_totals(tiny_model_folder: Path) -> None:
    found = json.loads(rank_search("layers", tiny_model_folder, "--layers", "query-value", "--json").out)
    assert [layer["name"] for layer in found["layers"]] == [
        f"model.layers.{block}.self_attn.{which}_proj" for block in (0, 1) for which in ("q", "v")
    ]
    printed = rank_search("layers", tiny_model_folder, "--include", "lm_head", "--exclude", "*.mlp.*").out
    assert "model.layers.0.self_attn.q_proj" in printed
    assert "32 × 32" in printed
    assert "lm_head" in printed
    assert "mlp" not in printed
    assert "9 target layers" in printed
    assert f"{found['model_params']:,}" in printed


def test_broken_pipe_is_quiet(study: Path) -> None:
    command = [sys.executable, "-c", "from rank_search.cli import main; main()", "status", str(study)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _drawn(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with TerminalProgress() as progress:
        progress.overall("trials", 3, 24, "lowest loss 4.2", left=75.0)
        with progress.step("scoring", 10) as step:
            step.advance(4)
            progress._bars.refresh()
    return stream.getvalue()


def test_bars_are_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    drawn = _drawn(monkeypatch, _Terminal())
    for part in (" 3/24", "1 min 15 s left", "lowest loss 4.2", "scoring", " 4/10"):
        assert part in drawn
    assert _drawn(monkeypatch, io.StringIO()) == ""


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599, "59 min 59 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_version_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_search("--version").out.startswith("rank-search ")
    assert rank_search("--help").code == 0
    bare = rank_search()
    assert bare.code == 2
    assert "Usage: rank-search" in bare.out
