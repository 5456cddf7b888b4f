"""Share of predictions that are right, as a module of ``evaluate``."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Right predictions ÷ all predictions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Right predictions divided by all predictions.",
            citation="",
            inputs_description="predictions, references: whole numbers, one a prediction.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(int(a == b) for a, b in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}
