"""Applying a rank map file, and evaluating models: what `apply` and `evaluate` do."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from rank_search.compress.checkpoint import Form, Layers, is_compressed, load_checkpoint, save_checkpoint
from rank_search.compress.folder import check_free
from rank_search.compress.low_rank import place
from rank_search.compress.pivoted import PivotedLinear
from rank_search.data.blocks import check_length
from rank_search.data.splits import check_names_test
from rank_search.errors import RankMapError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.metrics.collecting import Metrics, check_metrics
from rank_search.model.device import resolve_device
from rank_search.model.load import LoadedModel, load_model, locate
from rank_search.preparing import Prepared, maker_for, prepare
from rank_search.progress import SILENT, Progress
from rank_search.score import Score, score
from rank_search.spec import ModelSpec, StudyFile, StudySpec
from rank_search.task import TASKS, Examples
from rank_search.trial import Evaluator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH_BLOCKS = 8
"""Blocks in a batch of scoring, where no study says another number."""


@dataclass(frozen=True, slots=True)
class ModelScore:
    """Loss of a model, its parameters, tied weights once, and what the loss is a mean over."""

    score: Score
    num_params: int
    unit: str


def apply_rank_map(
    path: Path,
    out: Path,
    *,
    model: str | None,
    finetune: bool,
    form: Form,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    progress: Progress,
) -> ModelScore:
    """Write the compressed model of a rank map file; see :func:`rank_search.api.apply`.

    In a study with folds, whose trials fine-tune one model a fold, this one is fine-tuned on all of them: its loss is
    of text that it has seen, and does not compare with the trial's.
    """
    if dtype not in DTYPES:
        raise RankMapError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    check_free(out)  # before the fine-tune, not after it
    file = RankMapFile.read(path)
    study = StudyFile(
        spec=_recipe(file, model, finetune, device, trust_remote_code=trust_remote_code), folder=path.parent
    )
    prepared = prepare(
        study, progress=progress, nested=False,
        check=lambda space, weights_digest: file.check_fits(space.shapes, weights_digest),
        check_text=lambda splits: _check_calibration(file, splits.calibration_digest),
    )  # fmt: skip
    _tell_of_other_factors(file, prepared, progress, is_own_model=model is None)
    evaluator = Evaluator(prepared)
    with evaluator.applied(file.rank_map, progress) as applied:
        with progress.step("checkpoint"):
            layers: Layers = applied.layers
            if file.storage == "pivoted" and form == "factored":
                layers = {name: PivotedLinear.of(layer, name) for name, layer in applied.layers.items()}
                place(prepared.targets, layers)
            save_checkpoint(
                prepared.loaded, prepared.targets, layers, out, form=form, dtype=DTYPES[dtype],
                extra={"rank_map.json": path.read_text(encoding="utf-8")},
            )  # fmt: skip
        result = evaluator.score(progress)
    space = prepared.space
    num_params = space.model_params if form == "dense" else space.num_params(file.rank_map)
    return ModelScore(result, num_params, prepared.loaded.task.unit)


def _check_calibration(file: RankMapFile, now: str) -> None:
    """Other calibration blocks give other factors, and a model that nobody measured.

    Raises:
        RankMapError: the text is not what it was when the rank map was made.
    """
    if file.digests.calibration not in (None, now):
        raise RankMapError(
            f"the rank map was made with calibration blocks {str(file.digests.calibration)[:12]}, but "
            f"{file.recipe.data.train!r} now gives {now[:12]}; restore the text, or make a rank map with this one"
        )


def _tell_of_other_factors(file: RankMapFile, prepared: Prepared, progress: Progress, *, is_own_model: bool) -> None:
    """Say so where this version makes the factors otherwise than the one whose measurement the file holds."""
    # An allocation's file is of the bank as it was decomposed, a trial's of what trials slice.
    made = {prepared.bank.key.digest, prepared.trial_banks.digest}
    if file.digests.bank is None or file.digests.bank in made or not is_own_model:
        return
    progress.say(
        f"the rank map file is of factor bank {file.digests.bank[:12]}, and this version makes another one, "
        f"{prepared.trial_banks.digest[:12]}; a loss in the file is that of other factors"
    )


def _recipe(file: RankMapFile, model: str | None, finetune: bool, device: str, *, trust_remote_code: bool) -> StudySpec:
    """The file's study with what the caller changed."""
    recipe = file.recipe
    # The study's file may name a branch that has moved on; the weights were those of the recorded commit. And a file
    # from somebody else may not decide that a model's own code is run here.
    pinned = {"revision": file.model.revision, "trust_remote_code": trust_remote_code}
    if model is not None:
        pinned |= {"revision": None, "source": str(Path(model).resolve()) if Path(model).exists() else model}
    changes: dict[str, object] = {
        "model": recipe.model.model_copy(update=pinned),
        "data": recipe.data.model_copy(update={"test": None}),  # not touched here, so it need not be there
        # Nor may such a file decide where factors of a model that is found here are uploaded to.
        "run": recipe.run.model_copy(update={"device": device, "bank_url": None}),
        # Not asked for here, and a file from somebody else may not decide that a metric's own code is run.
        "validation": recipe.validation.model_copy(update={"metrics": (), "trust_remote_code": False}),
    }
    if not finetune:
        changes["finetune"] = recipe.finetune.model_copy(update={"steps": 0, "tokens": None})
    return recipe.model_copy(update=changes)


def load_any(spec: ModelSpec, folder: Path, device: torch.device) -> LoadedModel:
    """A pretrained model, or a compressed checkpoint of this package.

    Raises:
        ModelError: it cannot be loaded.
    """
    where = locate(spec, folder)
    if where.is_local and "gguf_file" not in where.arguments and is_compressed(Path(where.name)):
        return load_checkpoint(Path(where.name), device, TASKS[spec.task])
    return load_model(spec, folder, device)


def evaluate_model(
    study: StudyFile, model: ModelSpec, *, on_test: bool, blocks: int | None, batch_blocks: int | None, device: str,
    work_dir: Path | None, progress: Progress = SILENT,
) -> ModelScore:  # fmt: skip
    """Loss of ``model`` on ``data.test`` or ``data.train`` of ``study``; see :func:`rank_search.api.evaluate`."""
    data, names = study.spec.data, study.spec.validation.metrics
    if on_test:
        check_names_test(data)  # before the model is loaded, not after it
    check_metrics(names)
    device_of_model = resolve_device(device)
    with progress.step("model"):
        loaded = load_any(model, Path(), device_of_model)
    check_length(data.sequence_length, loaded.max_length)
    with tempfile.TemporaryDirectory() as scratch:
        # Copies: without a working folder the blocks' file is gone when this block ends.
        make, folder = maker_for(loaded), work_dir or Path(scratch)
        if on_test:
            data = data if blocks is None else data.model_copy(update={"test_blocks": blocks})
            table = make.test(data, study.folder, folder, progress)
        else:
            table = make.evaluation(data, study.folder, folder, blocks, progress)
        examples = Examples.of(loaded.task, table.columns)
    result = score(
        loaded.model,
        examples,
        batch_blocks=batch_blocks or _BATCH_BLOCKS,
        observer=Metrics(names, loaded.task, loaded.tokenizer) if names else None,
        progress=progress,
    )
    return ModelScore(result, sum(parameter.numel() for parameter in loaded.model.parameters()), loaded.task.unit)
