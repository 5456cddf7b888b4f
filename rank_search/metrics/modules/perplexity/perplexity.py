"""Perplexity from the losses of single predictions, as a module of ``evaluate``."""

import math

import datasets
import evaluate


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """exp of the mean loss."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The exponential of the mean loss.",
            citation="",
            inputs_description="losses: nats, one a prediction.",
            features=datasets.Features({"losses": datasets.Value("float64")}),
        )

    def _compute(self, losses: list[float]) -> dict[str, float]:
        mean = math.fsum(losses) / len(losses)
        return {"perplexity": math.exp(mean) if mean < 709 else math.inf}
