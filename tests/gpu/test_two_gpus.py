"""One model over two GPUs: the same figures as on one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rank_search.factors.statistics import collect_statistics
from rank_search.model.spread import devices_of, spread
from rank_search.model.targets import find_targets
from rank_search.preparing import Prepared, prepare
from rank_search.spec import TargetSpec, load_study_file
from rank_search.task import Examples
from rank_search.trial import Evaluator
from tests.conftest import StudyFactory
from tests.data import families, models
from tests.data.heard import Heard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
BOTH = tuple(torch.device("cuda", number) for number in range(2))


def _prepared(tiny_study: StudyFactory, gpus: int, family: str = "llama", **finetune: object) -> Prepared:
    """With a bank of its own."""
    run = {"device": "cuda", "gpus_per_model": gpus, "work_dir": f"work{gpus}"}
    return prepare(load_study_file(tiny_study(family, run=run, finetune={"compiled": False, **finetune})))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "t5"])
def test_statistics_and_loss_are_those_of_one_gpu(family: str) -> None:
    blocks = torch.randint(models.VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(0)).int()
    examples = families.examples(family, 16) if family == "t5" else Examples.causal(blocks)
    found = []
    for devices in (BOTH[:1], BOTH):
        torch.manual_seed(0)
        model = families.trained(family) if family == "t5" else models.make(family)
        count = len(list(model.parameters()))
        if len(devices) == 1:
            nn.Module.to(model, devices[0])
        else:
            spread(model, devices)
        assert devices_of(model) == devices
        assert len(list(model.parameters())) == count  # what was tied is tied
        targets = find_targets(model, TargetSpec())
        assert family != "llama" or {target.device for target in targets} == set(devices)
        statistics = collect_statistics(model, targets, examples, batch_blocks=4, seed=0)
        with torch.no_grad():
            loss = examples.task.loss(model, examples.to(devices[0], torch.long).tensors)
        found.append((statistics, float(loss)))
        assert loss.device == devices[0]
    (expected, expected_loss), (two, loss) = found
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name, layer in expected.items():
        for one, other in ((layer.A, two[name].A), (layer.G, two[name].G)):
            assert one is not None
            assert other is not None
            # Labels that were drawn otherwise would differ by far more.
            assert float((one.cpu() - other.cpu()).norm() / one.cpu().norm()) < 1e-2, name


@pytest.mark.parametrize("train", ["factors", "all"])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_trial_measures_what_it_does_on_one_gpu(tiny_study: StudyFactory, family: str, train: str) -> None:
    losses = []
    for gpus in (1, 2):
        prepared = _prepared(tiny_study, gpus, family, steps=8, train=train)
        assert len(devices_of(prepared.model)) == gpus
        before = {name: tensor.clone() for name, tensor in prepared.model.state_dict().items()}
        evaluator = Evaluator(prepared)
        rank_map = prepared.allocator.uniform(0.5)
        first = evaluator.measure(rank_map)
        with evaluator.applied(rank_map) as applied:
            places = {layer.inner.weight.device for layer in applied.layers.values()}
            # An embedding that is the head, too, is so large a part of a tiny model that both blocks are apart from it.
            assert places == set(BOTH[:gpus] if family == "llama" else BOTH[gpus - 1 : gpus])
        after = prepared.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert evaluator.measure(rank_map).loss == first.loss
        assert first.peak_memory > 0
        losses.append((first.loss, *first.train_losses))
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=5e-3, atol=0)


def test_a_bank_is_that_of_one_gpu_and_lies_where_its_layers_are(tiny_study: StudyFactory) -> None:
    one, two = (_prepared(tiny_study, gpus) for gpus in (1, 2))
    assert one.bank.path.parent != two.bank.path.parent
    for target in one.targets:
        torch.testing.assert_close(two.bank[target.name].sigma, one.bank[target.name].sigma, rtol=2e-2, atol=1e-4)
    factors = two.bank.on({target.name: target.device for target in two.targets})
    for target in two.targets:
        assert factors[target.name].out.device == target.device


def test_a_nested_fine_tune_is_that_of_one_gpu(tiny_study: StudyFactory) -> None:
    losses = []
    for gpus in (1, 2):
        prepared = _prepared(tiny_study, gpus, mode="nested", nested_steps=12, nested_ranges=1, steps=0)
        losses.append(Evaluator(prepared).measure(prepared.allocator.uniform(0.5)).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_that_steps_are_not_recorded_is_told_once(tiny_study: StudyFactory) -> None:
    heard = Heard()
    run = {"device": "cuda", "gpus_per_model": 2}
    prepared = prepare(load_study_file(tiny_study(run=run, finetune={"steps": 4})), progress=heard)
    Evaluator(prepared).measure(prepared.allocator.uniform(0.5), heard)
    told = [line for line in heard.lines if "spread" in line or "compil" in line or "record" in line]
    assert told == ["the model is spread over 2 GPUs; its steps are neither compiled nor recorded"]
