"""Share of texts that are written exactly as they should be, as a module of ``evaluate``."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """Texts equal to their references ÷ all texts; white space at both ends does not count."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Texts that equal their references divided by all texts.",
            citation="",
            inputs_description="predictions, references: texts.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        right = sum(int(a.strip() == b.strip()) for a, b in zip(predictions, references, strict=True))
        return {"exact_match": right / len(references)}
