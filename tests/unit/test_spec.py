"""The study file: what it may say, and what is refused in one clear line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rank_search.errors import StudyFileError, StudyMismatchError
from rank_search.spec import FactorSpec, StudySpec, load_study_file, parse_study

LEAST = 'name = "s"\n[model]\nsource = "m"\n'


def test_a_stored_file_means_what_it_meant_when_it_was_stored() -> None:
    tables = parse_study({"name": "x", "model": {"source": "org/model"}}, where="test").model_dump(mode="json")
    del tables["factors"]["gain_step"]
    tables["finetune"] |= {"mode": "nested", "train": "all"}
    stored = parse_study(tables, where="the database", stored=True)
    assert (stored.factors.gain_step, stored.factors.slope_power) == (0.0, FactorSpec().slope_power)
    assert stored.finetune.train == "all"
    with pytest.raises(StudyFileError, match="train = 'all' is for a trial's own steps"):
        parse_study(tables, where="a file")
    now = stored.model_copy(update={"factors": FactorSpec()})
    with pytest.raises(StudyMismatchError, match=r"was made with factors.gain_step = 0.0, the file now says 0.2"):
        now.check_same_meaning(stored)


def _write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _parse(**tables: object) -> StudySpec:
    return parse_study({"name": "s", "model": {"source": "m"}, **tables}, where="here")


def test_a_name_and_a_model_are_enough(tmp_path: Path) -> None:
    study = load_study_file(_write(tmp_path, LEAST))
    assert study.spec == _parse()
    assert study.spec.factors.method == "kfac"
    assert study.spec.data.train == "python-docs"
    assert study.spec.targets.layers == "linear"
    assert study.folder == tmp_path
    assert study.work_dir == tmp_path / "work"
    assert study.default_storage == f"sqlite:///{tmp_path}/s.db"


def test_all_tables_are_read(tmp_path: Path) -> None:
    text = LEAST + (
        'revision = "abc"\n[targets]\nlayers = "attention"\nshare = 1\ninclude = ["lm_head"]\nstorage = "pivoted"\n'
        "[finetune]\ntokens = 1000\nlearning_rate = 1\n[search]\nladder = [1, 0.5]\nmax_kept = 1\n"
    )
    spec = load_study_file(_write(tmp_path, text)).spec
    assert spec.model.revision == "abc"
    assert spec.targets.include == ("lm_head",)
    assert spec.targets.share == 1.0
    assert spec.search.ladder == (1.0, 0.5)
    assert spec.finetune.steps_for(100) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not valid TOML"),
        ('name = "s"\n', "model: Field required"),
        ('[model]\nsource = "m"\n', "name: Field required"),
        (LEAST + 'revison = "a"\n', "unknown key 'model.revison'; did you mean 'revision'?"),
        (LEAST + "[serach]\ntrials = 3\n", "unknown key 'serach'; did you mean 'search'?"),
        (LEAST + "[run]\nzzz = 3\n", "unknown key 'run.zzz'; known keys are device, work_dir, bank_url"),
        (LEAST + "[search]\ntrials = 0\n", "search.trials: Input should be greater than or equal to 1, not 0"),
        (LEAST + '[search]\ntrials = "3"\n', "search.trials: Input should be a valid integer, not '3'"),
        (LEAST + "[search]\ntrials = true\n", "search.trials: Input should be a valid integer, not True"),
        (LEAST + "[search]\nmin_kept = 0.9\nmax_kept = 0.5\n", r"search: min_kept (0.9) must be below max_kept (0.5)"),
        (LEAST + "[search]\nladder = [0.5, 1.5]\n", "search.ladder.1: Input should be less than or equal to 1"),
        (LEAST + '[search]\nseeds = ["uniform", "uniform"]\n', "search: seeds (uniform, uniform) name"),
        (LEAST + '[search]\nseeds = ["slicegpt"]\n', "search.seeds.0: Input should be 'closed-form', "),
        (LEAST + '[search]\nsampler = "cma"\n', "search.sampler: Input should be 'fitted', 'tpe'"),
        (LEAST + "[targets]\nshare = 0\n", "targets.share: Input should be greater than 0, not 0"),
        (LEAST + "[finetune]\nlearning_rate = nan\n", "finetune.learning_rate: "),
        (LEAST + "[finetune]\nlearning_rate = inf\n", "finetune.learning_rate: "),
        (LEAST + "[finetune]\nsteps = 5\ntokens = 5\n", "finetune: give steps or tokens, not both"),
        (LEAST + '[finetune]\nmode = "nested"\ntrain = "all"\n', "finetune: train = 'all' is for a trial's own steps"),
        (LEAST + "[data]\ntrain_blocks = 4\n", "data.train_blocks (4) must be at least finetune.batch_blocks (8)"),
        (LEAST + '[run]\ndevice = "gpu"\n', "run.device: "),
        *(
            (LEAST + f'[run]\nbank_url = "{url}"\n', f"run.bank_url: {message}")
            for url, message in (
                ("s3://key:word@bucket", "takes no password, '?' or '#'; its driver reads credentials from the"),
                ("sftp://key:wo/rd@host/folder", "takes no password"),
                ("key:word@bucket", "must be a URL such as s3://bucket/folder or file:///folder"),
                ("https://host/folder?signature=word", "takes no password, '?'"),
                ("banks", "must be a URL"), ("/shared/banks", "must be a URL"), ("s3://", "must be a URL"),
                ("cache::s3://bucket", "must be a URL"), ("s3://bucket\\nfolder", "must be a URL"),
                ("", "must be a URL"),
                ("file://banks", "must name an absolute folder, as file:///folder does"),
            )
        ),
        (LEAST + "[run]\nstatistics_memory = 0\n", "run.statistics_memory: Input should be greater than 0"),
        (LEAST + '[run]\ndevice = "cuda:1"\ngpus_per_model = 2\n', "gpus_per_model needs device = 'auto'"),
        (LEAST + "[run]\nthreads = 1000000000000\n", "run.threads: Input should be less than or equal to 4096"),
        (LEAST + f"[factors]\nseed = {2**63}\n", "factors.seed: Input should be less than"),
        (LEAST + f"[search]\nseed = 1{'0' * 5000}\n", "is not valid TOML"),
        (LEAST + f"[search]\nladder = {'[' * 3000}{']' * 3000}\n", "is not valid TOML"),
        (LEAST + "[search]\nmultiplier_range = 1000.0\n", "search.multiplier_range: Input should be less than"),
        (LEAST + "[finetune]\nlearning_rate = 1e300\n", "finetune.learning_rate: Input should be less than"),
        (LEAST + "[data]\ntrain = 2020-01-01\n", "no key takes a date or time, as 2020-01-01 is"),
        (LEAST + '[data]\nvalidation = ""\n', "data.validation: String should have at least 1 character"),
        (LEAST.replace('"s"', '"a b"'), "name: "),
        (LEAST.replace('"m"', '""'), "model.source: "),
        (LEAST.replace('"m"', "7"), "model.source: Input should be a valid string, not 7"),
        (LEAST + "[data]\nsequence_length = 1\n", "data.sequence_length: Input should be greater than or equal to 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_that_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(StudyFileError) as caught:
        load_study_file(path)
    assert str(caught.value).startswith(f"study file {path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "word" not in str(caught.value).replace("password", "")  # of the URLs


def test_a_missing_file_and_a_file_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"nothing.toml: No such file or directory$"):
        load_study_file(tmp_path / "nothing.toml")
    with pytest.raises(StudyFileError, match="Is a directory"):
        load_study_file(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyFileError, match="not UTF-8 text"):
        load_study_file(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    "url",
    ["s3://bucket", "gs://bucket/folder/", "abfs://box@account.dfs.core.windows.net/x", "file:///a b", "memory://x"],
)
def test_a_bank_may_be_kept_wherever_fsspec_reaches(url: str) -> None:
    assert _parse(run={"bank_url": url}).run.bank_url == url


def test_size_and_place_do_not_change_the_meaning() -> None:
    base = _parse()
    same = _parse(search={"trials": 999}, run={"device": "cpu", "threads": 2, "work_dir": "x", "bank_url": "s3://x"})
    assert same.digest == base.digest
    same.check_same_meaning(base)


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"factors": {"method": "svd"}}, 'factors.method = "svd", the file now says "kfac"'),
        ({"finetune": {"learning_rate": 0.1}}, "finetune.learning_rate = 0.1, the file now says null"),
        ({"search": {"ladder": [0.5]}}, r"search.ladder = [0.5], the file now says [0.9, 0.8, 0.6, 0.4]"),
        ({"model": {"source": "other"}}, 'model.source = "other", the file now says "m"'),
        ({"targets": {"share": 0.5}}, "targets.share = 0.5, the file now says null"),
    ],
)
def test_a_change_of_meaning_is_refused_by_its_field(tables: dict[str, object], field: str) -> None:
    stored = _parse(**tables)
    assert stored.digest != _parse().digest
    with pytest.raises(StudyMismatchError) as caught:
        _parse().check_same_meaning(stored)
    assert field in str(caught.value)


def test_a_spec_round_trips_through_json() -> None:
    spec = _parse(search={"ladder": [0.5]}, targets={"include": ["lm_head"]})
    again = StudySpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert again.digest == spec.digest


@pytest.mark.parametrize("value", ["dens", 0, -3, 1.5, True, [1]])
def test_what_layers_cannot_be_frozen_at_is_refused_in_its_own_words(value: object) -> None:
    told = re.escape(f"""targets.frozen gives '*q_proj' {value!r}; give it a rank from 1 on, or "dense\"""")
    with pytest.raises(StudyFileError, match=told):
        _parse(targets={"frozen": {"*": "dense", "*q_proj": value}})


def test_a_study_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _parse().name = "other"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"data": {"label_column": "x"}}, "data.label_column goes with model.task = 'sequence-classification', not"),
        ({"data": {"pair_column": "x"}}, "data.pair_column goes with model.task = 'sequence-classification', not"),
        ({"data": {"target_column": "x"}}, "data.target_column goes with model.task = 'seq2seq-lm', not"),
        ({"validation": {"metrics": ["f1"]}}, "'f1' does not fit model.task = 'causal-lm'; it fits sequence-class"),
        ({"validation": {"metrics": ["accuracy", "accuracy"]}}, "validation.metrics: name every metric once"),
        ({"validation": {"metrics": ["bleu"]}}, "metric 'bleu' is none of accuracy, f1, exact_match, perplexity; set"),
        ({"validation": {"metrics": ["../mine"]}}, "validation.metrics.0: String should match pattern"),
        ({"validation": {"folds": 1}}, "validation.folds: Input should be greater than or equal to 2, not 1"),
        ({"validation": {"folds": 3}, "data": {"validation": "v.txt"}}, "leave out data.validation, or validation.f"),
        ({"validation": {"folds": 3}, "data": {"validation_blocks": 3}}, "leave out data.validation_blocks, or"),
        ({"validation": {"folds": 3}, "data": {"train_blocks": 30}}, "leave out data.train_blocks, or validation.f"),
        ({"validation": {"folds": 3}, "finetune": {"mode": "nested"}}, "validation.folds needs finetune.mode = 'own'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(tables: dict[str, object], message: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        _parse(**tables)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metrics_of_the_hub_need_trust() -> None:
    spec = _parse(validation={"metrics": ["owner/bleu"], "trust_remote_code": True})
    assert spec.validation.metrics == ("owner/bleu",)
