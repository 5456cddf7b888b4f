"""One model over several GPUs: which block goes where, and what is moved between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rank_search.errors import DeviceError
from rank_search.factors.statistics import collect_statistics
from rank_search.launch.launching import make_job
from rank_search.launch.worker import spread_over
from rank_search.model.device import resolve_devices
from rank_search.model.spread import ModelPart, devices_of, parts_of_model, places, spread
from rank_search.model.targets import find_targets
from rank_search.spec import StudyFile, TargetSpec, parse_study
from rank_search.task import Examples
from tests.data import families, models

CPU, META = torch.device("cpu"), torch.device("meta")


def _llama(blocks: int, embedding: int = 4, *, tied: bool = False) -> list[ModelPart]:
    head = ModelPart("head", 0, tied_to=("embedding",)) if tied else ModelPart("head", embedding)
    run = [ModelPart(f"block{number}", 10, is_block=True) for number in range(blocks)]
    return [ModelPart("embedding", embedding), *run, ModelPart("norm", 1), ModelPart("rotary", 0), head]


def _runs(found: dict[str, int]) -> list[int]:
    return [number for name, number in found.items() if name.startswith("block")]


def test_blocks_are_shared_out_in_runs() -> None:
    assert _runs(places(_llama(4), 2)) == [0, 0, 1, 1]
    assert _runs(places(_llama(8), 4)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert list(places(_llama(2), 4).values()) == [0, 1, 2, 3, 0, 3]  # as many as there can be
    assert _runs(places(_llama(4), 1)) == [0, 0, 0, 0]
    # A large embedding and its head stand for blocks.
    assert _runs(places(_llama(6, embedding=20, tied=True), 2)) == [0, 0, 1, 1, 1, 1]


def test_what_stands_around_the_blocks_is_with_them() -> None:
    found = places(_llama(4), 2)
    assert (found["embedding"], found["norm"], found["head"]) == (0, 1, 1)
    assert found["rotary"] == 0  # it has no parameters, and its input is there
    assert places(_llama(4, tied=True), 2)["head"] == 0


@pytest.mark.parametrize("family", [*models.FAMILIES, "t5"])
def test_every_parameter_of_a_family_has_its_place_and_none_has_two(family: str) -> None:
    model = families.trained(family) if family == "t5" else models.make(family)
    parts = parts_of_model(model)
    found = places(parts, 2)
    assert set(found.values()) == {0, 1}
    at: dict[int, set[int]] = {}
    for part in parts:
        for parameter in model.get_submodule(part.name).parameters():
            at.setdefault(id(parameter), set()).add(found[part.name])
    assert set(at) == {id(parameter) for parameter in model.parameters()}
    assert all(len(numbers) == 1 for numbers in at.values())
    assert sum(part.nbytes for part in parts) >= sum(parameter.nbytes for parameter in model.parameters())


def test_blocks_that_share_a_parameter_over_a_cut_are_refused() -> None:
    tied = [ModelPart("a", 10, is_block=True), ModelPart("b", 10, is_block=True, tied_to=("a",))]
    assert places(tied, 1) == {"a": 0, "b": 0}
    with pytest.raises(DeviceError, match=r"b shares parameters with a; set run.gpus_per_model = 1$"):
        places(tied, 2)


def test_parameters_beside_the_blocks_are_refused() -> None:
    model = models.make("llama")
    model.model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(DeviceError, match=r"model\.scale stands beside its blocks; set run.gpus_per_model = 1$"):
        parts_of_model(model)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt", "t5"])
def test_a_spread_model_computes_what_it_did(family: str) -> None:
    examples = families.examples(family, 6) if family == "t5" else Examples.causal(torch.arange(72).reshape(6, 12))
    expected, found = ({}, {})
    for given, devices in ((expected, None), (found, (CPU, CPU))):
        model = families.trained(family) if family == "t5" else models.make(family)
        if devices:
            spread(model, devices)
        targets = find_targets(model, TargetSpec())
        given.update(collect_statistics(model, targets, examples, batch_blocks=3, seed=0))
    for name, layer in expected.items():
        assert torch.equal(layer.A, found[name].A), name
        assert torch.equal(layer.G, found[name].G), name


def test_a_block_gets_its_input_where_it_is() -> None:
    """The device without data stands for the second GPU: it tells where something is computed."""
    model = models.make("llama")
    spread(model, (CPU, META))
    assert devices_of(model) == (CPU, META)
    first, second = model.model.layers
    assert {p.device for module in (model.model.embed_tokens, first) for p in module.parameters()} == {CPU}
    assert {p.device for module in (second, model.lm_head) for p in module.parameters()} == {META}
    hidden = model.model.embed_tokens(torch.zeros(1, 4, dtype=torch.long))
    position = model.model.rotary_emb(hidden, torch.arange(4)[None])
    hidden = first(hidden, position_embeddings=position)
    assert hidden.device == CPU
    assert second(hidden, position_embeddings=position).device == META


def test_more_gpus_than_there_are_is_one_clear_line() -> None:
    assert resolve_devices("cpu", 1) == (CPU,)
    with pytest.raises(DeviceError, match=r"is to be spread over 99 GPUs, but .* can be used here; change"):
        resolve_devices("auto", 99)


def test_a_launched_worker_spreads_its_model_unless_the_file_says_otherwise() -> None:
    def with_run(**run: object) -> StudyFile:
        spec = parse_study({"name": "a", "model": {"source": "m"}, "run": run}, where="here")
        return StudyFile(spec=spec, folder=Path())

    def command(gpus: int | None, **run: object) -> tuple[str, ...]:
        return make_job(with_run(**run), Path("a.toml"), storage="sqlite:///a.db", gpus_per_worker=gpus).command()

    assert command(4)[-2:] == command(None, gpus_per_model=4)[-2:] == ("--gpus-per-model", "4")
    assert not any("--gpus-per-model" in command(gpus) for gpus in (None, 0, 1))
    assert spread_over(with_run(), 4).spec.run.gpus_per_model == 4
    assert spread_over(with_run(gpus_per_model=1), 4).spec.run.gpus_per_model == 1
    assert spread_over(with_run(), None).spec.run.gpus_per_model is None
