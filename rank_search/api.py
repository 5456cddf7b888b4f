"""The project from Python: each function is one of the CLI's commands, and the CLI only parses, calls and prints.

A study is named by its file, or by its name in a database given as ``storage`` (any SQLAlchemy URL).
Torch, transformers and Optuna are loaded by the functions that need them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rank_search.dashboard.viewing import StudyView as StudyView
from rank_search.errors import BudgetError, CrowdedError, DataError, RankMapError, StorageError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.front import Front, FrontPoint
from rank_search.idle_keys import idle_keys
from rank_search.progress import SILENT, Progress
from rank_search.ranks import LayerShape, RankMap
from rank_search.spec import DataSpec, ModelSpec, StudyFile, TargetSpec, TaskName, load_study_file, parse_study

if TYPE_CHECKING:
    from rank_search.applying import ModelScore
    from rank_search.insight import Insight
    from rank_search.preparing import Prepared
    from rank_search.study.facts import StudyFacts
    from rank_search.study.records import StudyStatus
    from rank_search.study.space import Seed
    from rank_search.study.store import StudyStore
    from rank_search.worker import Outcome

STORAGE_VARIABLE = "RANK_SEARCH_STORAGE"
STORAGE_FILE_VARIABLE = "RANK_SEARCH_STORAGE_FILE"
"""Names a file that holds the URL: a secret that no list of environments shows."""

StudyLike = StudyFile | Path | str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``evaluate`` found: loss in nats per token with its standard error, perplexity, parameters, metrics."""

    loss: float
    standard_error: float
    perplexity: float
    tokens: int
    num_params: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    unit: str = "token"
    """What the loss is a mean over, and ``tokens`` counts."""


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """The target layers of a model, and the parameters of the whole model (tied weights once)."""

    shapes: tuple[LayerShape, ...]
    model_params: int


def prepare(study: StudyLike, *, progress: Progress = SILENT) -> Prepared:
    """Load the model, cut the text into blocks, and open or build the factor bank."""
    from rank_search.preparing import prepare as prepare_study

    return prepare_study(_begun(study, progress), progress=progress)


def run(
    study: StudyLike,
    *,
    storage: str | None = None,
    trials: int | None = None,
    settle: bool = False,
    warm_start: str | None = None,
    progress: Progress = SILENT,
    on_outcome: Callable[[Outcome], None] = lambda _outcome: None,
) -> Front:
    """Create or resume a study, prepare, search until it has ``trials`` finished trials, and return its front.

    Args:
        trials: finished trials of the whole study, those of earlier runs counted in; None takes the study file's.
        settle: propose nothing new, but measure the pruned trials that would be on the front by prediction at the
            highest fidelity, however many trials the study has.
        warm_start: a study of the same model or of a sibling, whose front is measured first: its file, ``URL#NAME``,
            or its name in this study's database.

    Raises:
        InputError: the study file, its model, text, device or database; nothing was searched.
        StudyMismatchError: the study was made with a file, model or text that means something else.
        TrialError: several trials in a row failed for the same reason.
    """
    file = _begun(study, progress)
    if settle and trials is not None:
        raise BudgetError("give trials or settle, not both: settling takes as many trials as it needs")
    wanted = None if settle else _wanted(trials, file)
    url = storage_url(storage, file)
    from rank_search.study.patience import Patience
    from rank_search.study.samplers import check_sampler
    from rank_search.study.space import check_range

    patience = Patience(file.spec.run.database_patience_seconds, progress.say)
    pinned = patience.keep_trying(lambda: _as_stored(url, file), CrowdedError)
    check_sampler(file.spec.search)
    other = None
    if warm_start is not None:
        from rank_search.study.warm_start import OtherFront

        other = OtherFront.read(warm_start, url, file.spec.name)
    from rank_search.dashboard.refreshing import Refreshing
    from rank_search.dashboard.spectra import Spectra
    from rank_search.preparing import prepare as prepare_study
    from rank_search.stop_rules import StopRules
    from rank_search.study.study import Study, given_seeds
    from rank_search.study.turns import Turns
    from rank_search.trial import Evaluator
    from rank_search.worker import stop_reason, work

    prepared = prepare_study(
        pinned, progress=progress, nested=False, check=lambda space, _: check_range(file.spec.search, space),
        turn=Turns.of(url, file.spec.run.lease_seconds, patience),
    )  # fmt: skip
    asked = patience.keep_trying(lambda: given_seeds(file.spec, url, prepared.allocator), CrowdedError)
    given = _seed_rank_maps(prepared, asked, progress) if asked else {}
    opened = Study.open(
        file.spec, url, prepared.allocator, facts_of(prepared), given, spool=file.work_dir / "spool",
        patience=patience,
    )  # fmt: skip
    spectra = Spectra.of_tails(prepared.space.shapes, prepared.bank.tails())
    with closing(opened), Refreshing(url, opened.name, spectra, on_trouble=progress.say) as dashboard:
        if other is not None:
            opened.warm_start(other.carried_to(prepared.allocator, file.spec.search))
        rules = StopRules.of(file.spec.search)
        reason = stop_reason(opened, wanted, rules)
        if reason is None:
            evaluator = Evaluator(prepared)
            if opened.dense_loss is None:
                dense = evaluator.score(progress)
                opened.set_dense_loss(dense.loss, dense.metrics)
            dashboard.begin()

            def ended(outcome: Outcome) -> None:
                on_outcome(outcome)
                dashboard.after_trial()

            reason = work(opened, evaluator, wanted, rules=rules, progress=progress, on_outcome=ended)
        opened.set_stop_reason(reason)
        dashboard.end()
        return opened.front()


def allocate(
    study: StudyLike, kept: float, *, allocation: Literal["closed form", "uniform"] = "closed form",
    progress: Progress = SILENT,
) -> RankMapFile:  # fmt: skip
    """The rank map of an allocation at a kept fraction of the target layers, without a search.

    Raises:
        BudgetError: the kept fraction cannot be met.
    """
    from rank_search.preparing import prepare as prepare_study

    prepared = prepare_study(_file(study), progress=progress, nested=False, check=lambda space, _: space.budget(kept))
    rule = prepared.allocator.closed_form if allocation == "closed form" else prepared.allocator.uniform
    return RankMapFile.of(
        rule(kept), prepared.space, prepared.spec, weights_digest=prepared.loaded.weights_digest,
        allocation=f"{allocation} {kept:g}", revision=prepared.loaded.revision,
        calibration_digest=prepared.splits.calibration_digest, bank_digest=prepared.bank.key.digest,
    )  # fmt: skip


def front(study: StudyLike, *, storage: str | None = None) -> Front:
    """The front of a study, from its table."""
    store, name = _store(study, storage)
    with store:
        return store.front(name)


def status(study: StudyLike, *, storage: str | None = None) -> StudyStatus:
    """How far a study is."""
    store, name = _store(study, storage)
    with store:
        return store.status(name)


def view(study: StudyLike, *, storage: str | None = None) -> StudyView:
    """A study with its front and all its trials."""
    store, name = _store(study, storage)
    with store:
        return StudyView(store.study(name), store.front(name), tuple(store.trials(name)))


def explain(study: StudyLike, *, storage: str | None = None) -> Insight:
    """What a study found out: what layer types and depths want beside the closed form, which multipliers matter, and
    how well cheaper losses tell the order of the others.

    Raises:
        InputError: the study has measured nothing yet.
    """
    from rank_search.study.explaining import explain as explain_study

    return explain_study(*storage_of(study, storage))


def export(
    study: StudyLike,
    *,
    storage: str | None = None,
    trial: int | None = None,
    kept: float | None = None,
    max_params: int | None = None,
    max_loss: float | None = None,
    knee: bool = False,
) -> RankMapFile:
    """The rank map file of one trial, chosen by exactly one of the keyword arguments.

    Args:
        trial: by its number, on the front or not.
        kept: lowest loss among the front's points that keep at most this fraction of the target layers.
        max_params: lowest loss among those of at most so many parameters in the whole model.
        max_loss: fewest parameters among those of at most this validation loss, nats per token.
        knee: the front's knee.

    Raises:
        BudgetError: no point meets the choice.
        RankMapError: none or several choices were given.
    """
    choices = [trial is not None, kept is not None, max_params is not None, max_loss is not None, knee]
    if sum(choices) != 1:
        raise RankMapError(
            f"choose a point by exactly one of trial, kept, max_params, max_loss or knee, not by {sum(choices)}"
        )
    from rank_search.dashboard.artifacts import rank_map_file

    shown = view(study, storage=storage)
    point = _chosen(shown, trial, kept, max_params, max_loss)
    return rank_map_file(shown.record, point)


def study_folder(study: StudyLike, *, storage: str | None = None) -> Path:
    """The folder that a study's relative paths start from."""
    file = _existing_file(study)
    return file.folder if file else Path(view(study, storage=storage).record.facts.folder)


def apply(
    rank_map_file: Path | str, out: Path | str, *, model: str | None = None, finetune: bool = True,
    form: Literal["factored", "dense"] = "factored", dtype: str = "float32", device: str = "auto",
    trust_remote_code: bool = False, progress: Progress = SILENT,
) -> Evaluation:  # fmt: skip
    """Write the compressed model of a rank map file as a checkpoint folder, and return its validation loss.

    The factor bank of the file's recipe is opened, or built anew. With ``finetune`` the trial's short fine-tune is
    repeated, so that the checkpoint is the model whose loss was measured; of a study with folds, one model is tuned on
    all of them, and the loss is of text that it has seen.

    Args:
        model: another place of the same weights (hub id, folder or GGUF file).
        form: ``factored`` keeps the matrices of low rank in the file's storage form, ``dense`` multiplies them out.
        dtype: of the stored weights: float32, bfloat16 or float16.
        trust_remote_code: allow the model to run its own code, whatever the file says.

    Raises:
        RankMapError: the rank map is for another model; names the first module that does not fit.
        CheckpointError: the folder is in the way or cannot be written.
    """
    from rank_search.applying import apply_rank_map

    result = apply_rank_map(
        Path(rank_map_file), Path(out), model=model, finetune=finetune, form=form, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip
    return _evaluation(result)


def evaluate(
    model: str, data: DataSpec | None = None, *, study: StudyLike | None = None, task: TaskName = "causal-lm",
    metrics: Sequence[str] = (), blocks: int | None = None, batch_blocks: int | None = None, device: str = "auto",
    revision: str | None = None, trust_remote_code: bool = False, work_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Evaluation:  # fmt: skip
    """Loss and metrics of a model or a compressed checkpoint on ``data.train``, or on the test blocks of a study.

    Args:
        data: the text, cut into blocks of ``data.sequence_length``; its paths start from the current folder.
        study: a study whose ``data.test`` is the text, cut as the study's other texts; the task and the metrics are
            its own, too.
        task, metrics: with ``data``, what is asked of the model, as a study's ``model.task`` and
            ``validation.metrics``.
        blocks: only the first so many; None takes all, of a study its ``data.test_blocks``.
        batch_blocks: blocks in a batch; None takes the study's ``run.score_batch_blocks``, else 8.
        work_dir: where token blocks are kept; None takes the study's working folder, else keeps none.

    Raises:
        DataError: both or none of ``data`` and ``study`` were given, the study has no ``data.test``, or the text is
            missing or too short, or shares text with the study's train or validation.
        ModelError: the model cannot be loaded.
        MetricError: a metric cannot be loaded.
    """
    if (data is None) == (study is None):
        raise DataError(f"evaluate takes either data or study, not {'none' if data is None else 'both'} of them")
    from rank_search.applying import evaluate_model

    asked = None if study is None else _file(study)
    spec = ModelSpec(
        source=model, task=asked.spec.model.task if asked else task, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if asked is None:
        tables = {
            "name": "evaluation",
            "model": spec.model_dump(mode="json"),
            "data": data.model_dump(mode="json") if data else {},
            "validation": {"metrics": list(metrics), "trust_remote_code": trust_remote_code},
        }
        result = evaluate_model(
            StudyFile(spec=parse_study(tables, where="evaluate"), folder=Path()), spec, on_test=False, blocks=blocks,
            batch_blocks=batch_blocks, device=device, work_dir=work_dir, progress=progress,
        )  # fmt: skip
    else:
        result = evaluate_model(
            asked, spec, on_test=True, blocks=blocks, batch_blocks=batch_blocks or asked.spec.run.score_batch_blocks,
            device=device, work_dir=work_dir or asked.work_dir, progress=progress,
        )  # fmt: skip
    return _evaluation(result)


def layers(model: ModelSpec, targets: TargetSpec | None = None, *, progress: Progress = SILENT) -> ModelLayers:
    """The target layers that ``targets`` selects in a model."""
    import torch

    from rank_search.model.load import load_model
    from rank_search.model.targets import find_targets, rank_space, told_of_other_matrices

    targets = targets or TargetSpec()
    with progress.step("model"):
        loaded = load_model(model, Path(), torch.device("cpu"))
    space = rank_space(loaded.model, find_targets(loaded.model, targets), targets)
    if told := told_of_other_matrices(loaded.model):
        progress.say(told)
    return ModelLayers(space.shapes, space.model_params)


def storage_url(storage: str | None, file: StudyFile | None) -> str:
    """``storage``, else ``RANK_SEARCH_STORAGE``, else what is in the file ``RANK_SEARCH_STORAGE_FILE``, else the SQLite
    file beside the study's working folder.

    Raises:
        StorageError: none of them says it, or the file cannot be read.
    """
    url = given_storage(storage)
    if url is not None:
        return url
    if file is None:
        raise StorageError(
            f"no database is named: give --storage URL or set {STORAGE_VARIABLE}, or name a study by its file"
        )
    return file.default_storage


def given_storage(storage: str | None) -> str | None:
    """As :func:`storage_url` without a file, but None where nothing names a database.

    Raises:
        StorageError: the file of ``RANK_SEARCH_STORAGE_FILE`` cannot be read.
    """
    if storage is not None:
        return storage  # an empty one too: it is an unset variable in a script, not a wish for the default
    return os.environ.get(STORAGE_VARIABLE) or _secret_storage()


def storage_of(study: StudyLike, storage: str | None = None) -> tuple[str, str]:
    """The database of a study and its name there."""
    file = _existing_file(study)
    return storage_url(storage, file), file.spec.name if file else str(study)


def _secret_storage() -> str | None:
    path = os.environ.get(STORAGE_FILE_VARIABLE)
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise StorageError(f"{STORAGE_FILE_VARIABLE} names {path}, which cannot be read: {reason}") from None


def _evaluation(result: ModelScore) -> Evaluation:
    loss = result.score
    return Evaluation(
        loss.loss, loss.standard_error, loss.perplexity, loss.tokens, result.num_params, loss.metrics, result.unit
    )


def _file(study: StudyLike) -> StudyFile:
    return study if isinstance(study, StudyFile) else load_study_file(study)


def _begun(study: StudyLike, progress: Progress) -> StudyFile:
    """The study file; that a key in it does nothing is said."""
    file = _file(study)
    for told in idle_keys(file.spec):
        progress.say(told)
    return file


def _existing_file(study: StudyLike) -> StudyFile | None:
    """The study file, if the argument is one rather than a name in a database."""
    if isinstance(study, StudyFile):
        return study
    return load_study_file(study) if Path(study).suffix == ".toml" or Path(study).is_file() else None


def _store(study: StudyLike, storage: str | None) -> tuple[StudyStore, str]:
    from rank_search.study.store import StudyStore

    url, name = storage_of(study, storage)
    return StudyStore(url), name


def _wanted(trials: int | None, file: StudyFile) -> int:
    if trials is not None and trials < 1:
        raise BudgetError(f"trials must be at least 1, not {trials}")
    return file.spec.search.trials if trials is None else trials


def _as_stored(url: str, file: StudyFile) -> StudyFile:
    """The study file, with a hub model's revision pinned to the commit that the stored study resolved it to.

    A branch may have moved on since. What cannot be resumed or reached is refused here, before minutes of preparation.
    """
    from rank_search.study.store import find_study

    stored = find_study(url, file.spec.name)
    if stored is None:
        return file
    file.spec.check_same_meaning(stored.spec)
    if stored.facts.revision is None:
        return file
    model = file.spec.model.model_copy(update={"revision": stored.facts.revision})
    return StudyFile(spec=file.spec.model_copy(update={"model": model}), folder=file.folder)


def _seed_rank_maps(prepared: Prepared, seeds: Sequence[Seed], progress: Progress) -> dict[Seed, RankMap]:
    """The rank maps of seeds by published allocations, on the study's own untrained factors."""
    from rank_search.baselines.methods import Allocations

    rules = Allocations.of(prepared, progress=progress)
    return {seed: rules.rank_map(seed.allocation, seed.kept) for seed in seeds}


def facts_of(prepared: Prepared) -> StudyFacts:
    """What the database keeps of a prepared study."""
    from rank_search.study.facts import StudyFacts

    return StudyFacts(
        source=prepared.loaded.source,
        revision=prepared.loaded.revision,
        weights_digest=prepared.loaded.weights_digest,
        shapes=prepared.space.shapes,
        model_params=prepared.space.model_params,
        calibration_digest=prepared.splits.calibration_digest,
        train_digest=prepared.splits.train_digest,
        validation_digest=prepared.splits.validation_digest,
        bank=prepared.trial_banks.digest,
        folder=str(prepared.study.folder.resolve()),
    )


def _chosen(
    shown: StudyView, trial: int | None, kept: float | None, max_params: int | None, max_loss: float | None
) -> FrontPoint:
    if trial is not None:
        for point in shown.points:
            if point.trial == trial:
                return point
        raise BudgetError(f"study {shown.record.name!r} has no measured trial {trial}; see `rank-search status`")
    if kept is not None:
        return shown.front.at_most_kept(kept)
    if max_params is not None:
        return shown.front.at_most_params(max_params)
    if max_loss is not None:
        return shown.front.at_most_loss(max_loss)
    return shown.front.knee()
