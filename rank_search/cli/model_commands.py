"""Commands on a model: apply, evaluate, layers."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from rank_search import api
from rank_search.cli import tables
from rank_search.cli.options import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    RemoteCodeOption,
    RevisionOption,
    TaskOption,
    keys_as_options,
    option_of,
)
from rank_search.cli.progress import TerminalProgress
from rank_search.cli.quiet import quiet_libraries
from rank_search.compress.folder import check_free
from rank_search.errors import InputError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.spec import (
    METRICS,
    PYTHON_DOCS,
    DataSpec,
    Granularity,
    Layers,
    ModelSpec,
    StudyFile,
    StudySpec,
    TargetSpec,
    load_study_file,
)

_SPLIT = "test"
"""The split of a hub dataset that ``evaluate`` reads, unless told otherwise."""


def apply(
    rank_map: Annotated[Path, typer.Argument(metavar="RANK_MAP", help="A rank map file.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="The checkpoint folder to make.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another place of the same weights.", show_default=False),
    ] = None,
    no_finetune: Annotated[
        bool, typer.Option("--no-finetune", help="Leave the short fine-tune of the trial out.")
    ] = False,
    form: Annotated[
        Literal["factored", "dense"], typer.Option(help="Keep the factors, or multiply them out.")
    ] = "factored",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the stored weights.")
    ] = "float32",
    device: DeviceOption = "auto",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """Write the compressed model as a checkpoint folder that transformers loads."""
    file = RankMapFile.read(rank_map)
    recorded = file.measurement
    check_free(output)  # before minutes of work, not after them
    quiet_libraries()
    with TerminalProgress() as progress:
        found = api.apply(
            rank_map, output, model=model, finetune=not no_finetune, form=form, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    recipe = file.recipe
    tuned = not no_finetune and recipe.finetune.steps_for(recipe.data.sequence_length) > 0
    folds = recipe.validation.folds if tuned else None
    typer.echo(
        f"wrote {output}: {'on the text of its own fine-tune, ' if folds else ''}{tables.evaluation_line(found)}"
    )
    if recorded is not None:
        of = (
            f", mean over {folds} folds, each left out of a fine-tune" if folds and recorded.fidelity == "tuned" else ""
        )
        typer.echo(
            f"the rank map file has {recorded.loss:.4f} ± {recorded.standard_error:.4f} ({recorded.fidelity}{of})"
        )
    trust = ", trust_remote_code=True" if form == "factored" else ""
    trusted = trust_remote_code and form == "dense"  # the factored form brings no code that this package would run
    from rank_search.task import TASKS

    auto_class = TASKS[recipe.model.task].auto_class
    typer.echo(f'Load it:     transformers.{auto_class}.from_pretrained("{output}"{trust})')
    typer.echo(f"Evaluate it: {_evaluate_command(output, recipe, rank_map.parent, trust=trusted)}")


def _evaluate_command(checkpoint: Path, recipe: StudySpec, folder: Path, *, trust: bool = False) -> str:
    """How to score a checkpoint as its study would: on the test text, else on what else the study names.

    ``folder`` is what the recipe's relative paths start from; ``trust``: the model needs code of its own.
    """
    data, defaults = recipe.data, DataSpec()
    role = next((role for role in ("test", "validation") if getattr(data, role) is not None), "train")
    source = getattr(data, role)
    path = folder / Path(source).expanduser()
    given = {"train": str(path) if source != PYTHON_DOCS and path.exists() else source}
    if recipe.model.task != "causal-lm":
        given["task"] = recipe.model.task
    split = getattr(data, f"{role}_split")
    if source != PYTHON_DOCS and not path.exists():
        given |= {"train_split": split} if split != _SPLIT else {}
        given |= {"revision": data.revision} if data.revision is not None else {}
    for field in ("config", "column", "pair_column", "label_column", "target_column"):
        if getattr(data, field) != getattr(defaults, field):
            given[field] = getattr(data, field)
    given["sequence_length"] = str(data.sequence_length)
    if role != "train" and (blocks := getattr(data, f"{role}_blocks")) is not None:
        given["blocks"] = str(blocks)
    options = [word for field, value in given.items() for word in (option_of(field, "data"), value)]
    seen = "  # it was made with some of this text; name another one" if role == "train" else ""
    trusted = ["--trust-remote-code"] if trust else []
    return shlex.join(["rank-search", "evaluate", str(checkpoint), *options, *trusted]) + seen


def evaluate(
    model: ModelArgument,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Hub dataset, text, JSONL, CSV or Parquet file, or python-docs.", show_default=False
        ),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            metavar="STUDY.toml",
            help="Instead of --data: a study's test text, cut as it says.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Split of a hub dataset. Default: {_SPLIT}.", show_default=False)
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="Configuration of a hub dataset.", show_default=False)
    ] = None,
    data_revision: Annotated[
        str | None,
        typer.Option(metavar="COMMIT", help="Commit, tag or branch of a hub dataset.", show_default=False),
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column that holds the text. Default: text.", show_default=False)
    ] = None,
    pair_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a classifier: the column of a second text.", show_default=False),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a classifier: the labels' column.", show_default=False)
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of seq2seq-lm: the targets' column.", show_default=False)
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens in a block. Default: 128.", show_default=False)
    ] = None,
    task: TaskOption = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Beside the loss: {', '.join(METRICS)}, or one of the hub; several times.",
            show_default=False,
        ),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N blocks.", min=1, show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print loss, perplexity and parameters of a model or a compressed checkpoint on a text (--data or --study)."""
    options = {
        "train_split": split, "config": config, "column": column, "pair_column": pair_column,
        "label_column": label_column, "target_column": target_column, "sequence_length": sequence_length,
        "revision": data_revision,
    }  # fmt: skip
    given = {field: value for field, value in options.items() if value is not None}
    asked = {field: value for field, value in {"task": task, "metric": metric}.items() if value is not None}
    source, file = _text_of(data, study, given, asked)
    quiet_libraries()
    with nullcontext() if study else keys_as_options(), TerminalProgress() as progress:
        found = api.evaluate(
            model, source, study=file, task=task or "causal-lm", metrics=metric or (), blocks=blocks, device=device,
            revision=revision, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        typer.echo(f"{model}: {tables.evaluation_line(found)}")


def _text_of(
    data: str | None, study: Path | None, given: Mapping[str, str | int], asked: Mapping[str, object]
) -> tuple[DataSpec, None] | tuple[None, StudyFile]:
    """What ``evaluate`` scores on: a text of its own cut as ``given`` says, or a study's test text."""
    if (data is None) == (study is None):
        raise InputError(
            f"evaluate takes either --data SOURCE or --study STUDY.toml, not {'none' if data is None else 'both'} of "
            "them; see `rank-search evaluate --help`"
        )
    if study is not None:
        if given or asked:
            first = next(iter([*given, *asked]))
            raise InputError(f"{option_of(first, 'data')} goes with --data; with --study the study file says it")
        return None, load_study_file(study)
    try:
        return DataSpec.model_validate({"train": data, "train_split": _SPLIT, **given}), None
    except ValidationError as error:
        raise InputError(_refusal(error, "data")) from None


def layers(
    model: ModelArgument,
    layers: Annotated[Layers, typer.Option(help="Which layers of the blocks.")] = "linear",
    share: Annotated[
        float | None,
        typer.Option(metavar="F", help="Only the fewest that hold this share of their parameters.", show_default=False),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Module names to add.", show_default=False)
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Module names to leave out.", show_default=False)
    ] = None,
    split_qkv: Annotated[
        bool, typer.Option("--split-qkv", help="Query, key and value of a fused projection on their own.")
    ] = False,
    granularity: Annotated[Granularity, typer.Option(help="Whole matrices, or attention head by head.")] = "matrix",
    task: TaskOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the target layers of a model with shapes, parameters and share of the model."""
    try:
        targets = TargetSpec(
            layers=layers, share=share, include=tuple(include or ()), exclude=tuple(exclude or ()),
            split_qkv=split_qkv, granularity=granularity,
        )  # fmt: skip
        spec = ModelSpec(source=model, task=task or "causal-lm", revision=revision, trust_remote_code=trust_remote_code)
    except ValidationError as error:
        raise InputError(_refusal(error)) from None
    quiet_libraries()
    with keys_as_options(), TerminalProgress() as progress:
        found = api.layers(spec, targets, progress=progress)
    if not as_json:
        tables.print_layers(found)
        return
    rows = [
        {
            **dataclasses.asdict(shape),
            "params": shape.dense_params,
            "share_of_model": shape.dense_params / found.model_params,
        }
        for shape in found.shapes
    ]
    typer.echo(json.dumps({"layers": rows, "model_params": found.model_params}, indent=2))


def _refusal(error: ValidationError, table: str = "") -> str:
    """One line for the first option that the study file's own rules refuse."""
    first = error.errors(include_url=False)[0]
    return f"{option_of(str(first['loc'][0]), table)}: {first['msg']}, not {first['input']!r}"
