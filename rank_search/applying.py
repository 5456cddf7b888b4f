"""Applying a rank map file, and evaluating models: what `apply` and `evaluate` do."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from rank_search.compress.checkpoint import Form, check_free, is_compressed, load_checkpoint, save_checkpoint
from rank_search.data.blocks import check_length
from rank_search.data.sources import Source
from rank_search.data.splits import eval_blocks
from rank_search.errors import RankMapError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.model.device import resolve_device
from rank_search.model.load import LoadedModel, load_model, locate
from rank_search.preparing import prepare
from rank_search.progress import SILENT, Progress
from rank_search.score import Score, score
from rank_search.spec import DataSpec, ModelSpec, StudyFile, StudySpec
from rank_search.trial import Evaluator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelScore:
    """Loss of a model and its parameters, tied weights once."""

    score: Score
    num_params: int


def apply_rank_map(
    path: Path, out: Path, *, model: str | None, finetune: bool, form: Form, dtype: str, device: str, progress: Progress
) -> ModelScore:
    """Write the compressed model of a rank map file; see :func:`rank_search.api.apply`."""
    if dtype not in DTYPES:
        raise RankMapError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    check_free(out)  # before the fine-tune, not after it
    file = RankMapFile.read(path)
    if file.storage != "two-factor":
        raise RankMapError(
            f"rank map file {path} counts {file.storage} storage, which checkpoints cannot hold; use two-factor"
        )
    study = StudyFile(spec=_recipe(file, model, finetune, device), folder=path.parent)
    prepared = prepare(
        study, progress=progress, check=lambda space, weights_digest: file.check_fits(space.shapes, weights_digest)
    )
    evaluator = Evaluator(prepared)
    with evaluator.applied(file.rank_map, progress) as applied:
        with progress.step("checkpoint"):
            save_checkpoint(
                prepared.loaded, prepared.targets, applied.layers, out, form=form, dtype=DTYPES[dtype],
                extra={"rank_map.json": path.read_text(encoding="utf-8")},
            )  # fmt: skip
        result = evaluator.score(progress)
    return ModelScore(result, prepared.space.num_params(file.rank_map))


def _recipe(file: RankMapFile, model: str | None, finetune: bool, device: str) -> StudySpec:
    """The file's study with what the caller changed."""
    recipe = file.recipe
    # The study's file may name a branch that has moved on; the weights were those of the recorded commit.
    pinned = recipe.model.model_copy(update={"revision": file.model.revision})
    changes: dict[str, object] = {"model": pinned, "run": recipe.run.model_copy(update={"device": device})}
    if model is not None:
        source = str(Path(model).resolve()) if Path(model).exists() else model
        changes["model"] = recipe.model.model_copy(update={"source": source})
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
        return load_checkpoint(Path(where.name), device)
    return load_model(spec, folder, device)


def evaluate_model(
    spec: ModelSpec, data: DataSpec, *, blocks: int | None, batch_blocks: int, device: str,
    work_dir: Path | None, progress: Progress = SILENT,
) -> ModelScore:  # fmt: skip
    """Loss on one text; see :func:`rank_search.api.evaluate`."""
    place = resolve_device(device)
    with progress.step("model"):
        loaded = load_any(spec, Path(), place)
    check_length(data.sequence_length, loaded.max_length)
    source = Source.of(data, "train", Path())
    assert source is not None
    with tempfile.TemporaryDirectory() as scratch:
        # A copy: without a working folder the blocks' file is gone when this block ends.
        ids = torch.tensor(
            eval_blocks(
                source,
                loaded.tokenizer,
                data.sequence_length,
                work_dir=work_dir or Path(scratch),
                blocks=blocks,
                progress=progress,
            )
        )
    result = score(loaded.model, ids, batch_blocks=batch_blocks, progress=progress)
    return ModelScore(result, sum(parameter.numel() for parameter in loaded.model.parameters()))
