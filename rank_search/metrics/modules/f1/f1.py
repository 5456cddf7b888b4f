"""F1 averaged over classes, as a module of ``evaluate``."""

from collections import Counter

import datasets
import evaluate


class F1(evaluate.Metric):  # type: ignore[misc]
    """Mean over the classes of 2 · true positives ÷ (predicted + there), each class weighing the same."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The harmonic mean of precision and recall of every class, averaged over classes (macro).",
            citation="",
            inputs_description="predictions, references: whole numbers, one a prediction.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        predicted, there = Counter(predictions), Counter(references)
        right = Counter(a for a, b in zip(predictions, references, strict=True) if a == b)
        classes = predicted.keys() | there.keys()
        return {"f1": sum(2 * right[c] / (predicted[c] + there[c]) for c in classes) / len(classes)}
