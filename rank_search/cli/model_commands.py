"""Commands on a model: apply, evaluate, layers."""

from __future__ import annotations

import dataclasses
import json
import shlex
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
)
from rank_search.cli.progress import TerminalProgress
from rank_search.cli.quiet import quiet_libraries
from rank_search.errors import CheckpointError, InputError
from rank_search.export.rank_map_file import RankMapFile
from rank_search.spec import DataSpec, Layers, ModelSpec, TargetSpec


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
) -> None:
    """Write the compressed model as a checkpoint folder that transformers loads."""
    recorded = RankMapFile.read(rank_map).measurement
    _check_folder(output)
    quiet_libraries()
    with TerminalProgress() as progress:
        found = api.apply(
            rank_map, output, model=model, finetune=not no_finetune, form=form, dtype=dtype, device=device,
            progress=progress,
        )  # fmt: skip
    typer.echo(f"wrote {output}: {tables.evaluation_line(found)}")
    if recorded is not None:
        typer.echo(f"the rank map file has {recorded.loss:.4f} ± {recorded.standard_error:.4f} ({recorded.fidelity})")
    trust = ", trust_remote_code=True" if form == "factored" else ""
    typer.echo(f'Load it:     transformers.AutoModelForCausalLM.from_pretrained("{output}"{trust})')
    typer.echo(f"Evaluate it: rank-search evaluate {shlex.quote(str(output))} --data python-docs")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is in the way before minutes of work, not after them."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another folder or remove it")


def evaluate(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="Hub dataset, text, JSONL, CSV or Parquet file, or python-docs.", show_default=False
        ),
    ],
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of a hub dataset.")] = "test",
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="Configuration of a hub dataset.", show_default=False)
    ] = None,
    column: Annotated[str, typer.Option(metavar="NAME", help="Column that holds the text.")] = "text",
    sequence_length: Annotated[int, typer.Option(metavar="N", help="Tokens in a block.")] = 128,
    blocks: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N blocks.", min=1, show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print validation loss, perplexity and parameters of a model or a compressed checkpoint."""
    try:
        source = DataSpec(train=data, train_split=split, config=config, column=column, sequence_length=sequence_length)
    except ValidationError as error:
        raise InputError(_refusal(error)) from None
    quiet_libraries()
    with TerminalProgress() as progress:
        found = api.evaluate(
            model, source, blocks=blocks, device=device, revision=revision, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        typer.echo(f"{model}: {tables.evaluation_line(found)}")


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
    revision: RevisionOption = None,
    trust_remote_code: RemoteCodeOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the target layers of a model with shapes, parameters and share of the model."""
    try:
        targets = TargetSpec(layers=layers, share=share, include=tuple(include or ()), exclude=tuple(exclude or ()))
        spec = ModelSpec(source=model, revision=revision, trust_remote_code=trust_remote_code)
    except ValidationError as error:
        raise InputError(_refusal(error)) from None
    quiet_libraries()
    with TerminalProgress() as progress:
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


def _refusal(error: ValidationError) -> str:
    """One line for the first option that the study file's own rules refuse."""
    first = error.errors(include_url=False)[0]
    names = {"source": "MODEL", "train": "--data", "train_split": "--split"}
    field = str(first["loc"][0])
    option = names.get(field, "--" + field.replace("_", "-"))
    return f"{option}: {first['msg']}, not {first['input']!r}"
