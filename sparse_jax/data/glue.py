"""The tasks: eight of GLUE, and three for labels of one's own."""

from dataclasses import dataclass, replace
from types import MappingProxyType

from sparse_jax.errors import InputError

__all__ = ["CAUSAL", "TASKS", "Task", "find_task"]


@dataclass(frozen=True)
class Task:
    """What the columns of a file mean, and how predictions are evaluated.

    Columns have several names because the official files, the Hugging Face Hub and
    other collections differ; the first one found in a file counts.

    Example:
      >>> find_task("SST-2").labels
      ('negative', 'positive')
    """

    name: str  # also the name of the configuration on the Hub
    text_a: tuple[str, ...]
    text_b: tuple[str, ...] = ()  # empty for tasks on single texts
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] | None = ()  # empty: regression; None: read from the data
    metrics: tuple[str, ...] = ("accuracy",)  # the first is the primary one
    positive: str | None = None  # the class that F1 is about
    is_multilabel: bool = False  # whether an example has any number of the labels
    evaluation: tuple[str, ...] = ("validation", "test")
    headerless: tuple[str, ...] = ()  # columns of an official file without a header
    has_optional_text_b: bool = False
    # The official QQP file has line breaks inside questions. Its loader on the Hub
    # drops the halves, and published results rest on the rows that are left.
    drops_short_rows: bool = False

    @property
    def primary(self) -> str:
        """The metric that tables of results show."""
        return self.metrics[0]

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers rather than classes."""
        return self.labels == ()

    @property
    def problem_type(self) -> str:
        """What transformers calls the kind of its labels, in a `config.json`."""
        if self.is_regression:
            return "regression"
        kind = "multi" if self.is_multilabel else "single"
        return f"{kind}_label_classification"

    @property
    def num_outputs(self) -> int:
        """Numbers that a model predicts for each example, once labels are known."""
        return len(self.labels or ()) or 1


# In the order of the Hub, so that its integer labels mean the same here.
_ENTAILMENT = ("entailment", "not_entailment")

# Lists of labels make it the task multilabel, numbers with decimals regression.
_OWN = Task(
    "classification",
    text_a=("text", "text_a"),
    text_b=("text_b", "text_pair"),
    label=("label", "labels"),
    labels=None,
    metrics=("accuracy", "macro_f1"),
    has_optional_text_b=True,
)

_ALL = (
    Task(
        "cola",
        text_a=("sentence", "text_a"),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews",),
        headerless=("source", "label", "star", "sentence"),
    ),
    Task("sst2", text_a=("sentence", "text_a"), labels=("negative", "positive")),
    Task(
        "mrpc",
        text_a=("sentence1", "#1 String", "text_a"),
        text_b=("sentence2", "#2 String", "text_b"),
        label=("label", "Quality"),
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        positive="equivalent",
    ),
    Task(
        "stsb",
        text_a=("sentence1", "text_a"),
        text_b=("sentence2", "text_b"),
        label=("label", "score"),
        metrics=("pearson", "spearman"),
    ),
    Task(
        "qqp",
        text_a=("question1", "text_a"),
        text_b=("question2", "text_b"),
        label=("label", "is_duplicate"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        positive="duplicate",
        drops_short_rows=True,
    ),
    Task(
        "mnli",
        text_a=("premise", "sentence1", "text_a"),
        text_b=("hypothesis", "sentence2", "text_b"),
        label=("label", "gold_label"),
        labels=("entailment", "neutral", "contradiction"),
        evaluation=("validation", "validation_mismatched", "test"),
    ),
    Task(
        "qnli",
        text_a=("question", "text_a"),
        text_b=("sentence", "text_b"),
        labels=_ENTAILMENT,
    ),
    Task(
        "rte",
        text_a=("sentence1", "text_a"),
        text_b=("sentence2", "text_b"),
        labels=_ENTAILMENT,
    ),
    replace(
        _OWN,
        name="multilabel",
        metrics=("micro_f1", "macro_f1", "subset_accuracy"),
        is_multilabel=True,
    ),
    replace(
        _OWN,
        name="regression",
        label=("label", "score"),
        labels=(),
        metrics=("pearson", "spearman", "rmse"),
    ),
    _OWN,
)

CAUSAL = "causal"  # has texts without labels, so it is no `Task`
TASKS = MappingProxyType({task.name: task for task in _ALL})


def find_task(name: str) -> Task:
    """Returns the task of a name, in any case, with or without hyphens.

    Raises:
      InputError: if there is no such task.

    Example:
      >>> find_task("STS-B").primary
      'pearson'
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key not in TASKS:
        words = ", ".join((*TASKS, CAUSAL))
        raise InputError(f"`task` must be one of {words}, got {name!r}.")
    return TASKS[key]
