"""Keys that a study file gives and that do nothing in it. Pure: no torch, no Optuna."""

from __future__ import annotations

from collections.abc import Callable

from rank_search.spec import StudySpec

_Rule = tuple[str, tuple[str, ...], Callable[[StudySpec], bool], str]

_RULES: tuple[_Rule, ...] = (
    (
        "search", ("sliced_tokens",),
        lambda spec: "sliced" in (spec.search.fidelities or ()), "search.fidelities has 'sliced'",
    ),
    (
        "search", ("multiplier_range",),
        lambda spec: spec.search.space != "direct" or spec.finetune.mode == "nested",
        "search.space is 'multipliers' or 'groups', or finetune.mode 'nested'",
    ),
    ("search", ("flat_tolerance",), lambda spec: spec.search.flat_trials is not None, "search.flat_trials is given"),
    (
        "finetune", ("nested_steps", "nested_ranges"),
        lambda spec: spec.finetune.mode == "nested", "finetune.mode is 'nested'",
    ),
    (
        "finetune", ("dense_learning_rate",),
        lambda spec: spec.finetune.train == "all", "finetune.train is 'all'",
    ),
)  # fmt: skip
"""Table, its keys, whether they count, and what they count with."""


def idle_keys(spec: StudySpec) -> tuple[str, ...]:
    """A sentence for every key that was given and does nothing, which says when it would."""
    return tuple(
        f"{table}.{key} does nothing here: it counts where {condition}"
        for table, keys, counts, condition in _RULES
        if not counts(spec)
        for key in keys
        if key in getattr(spec, table).model_fields_set
    )
