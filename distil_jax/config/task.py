"""The configuration of fine-tuning: what a task is, and one run on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from distil_jax.config.model import HeadConfig, ModelConfig
from distil_jax.config.objective import TaskLossConfig
from distil_jax.config.run import ComputeConfig, MeshConfig, TeacherConfig, TrainConfig, check_seeds
from distil_jax.config.step import OptimizerConfig
from distil_jax.schema import path_field, require, require_finite, require_share

# The metrics of tasks. f1: of label 1, with two labels; macro_f1: the mean of every label's F1; entity_f1: of whole
# entities (IOB2); exact_match and span_f1: SQuAD's; pearson and spearman: the correlations, for a regression.
Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "entity_f1", "exact_match", "span_f1"]
_METRICS_OF_KIND: dict[str, tuple[str, ...]] = {
    "sequence": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "tokens": ("accuracy", "entity_f1"),
    "spans": ("exact_match", "span_f1"),
}


@dataclass(frozen=True)
class TaskConfig:
    """A labelled data set and its metrics.

    A source is a CSV, TSV, JSONL or Parquet file, or `hub:NAME[:CONFIG[:SPLIT]]`, as for `distil-jax prepare`.
    """

    # sequence: a label for each text or pair of texts; regression: a number for each; tokens: a label for each word;
    # spans: a question whose answer is a piece of a context.
    kind: Literal["sequence", "regression", "tokens", "spans"] = "sequence"
    train: str = path_field("")  # source of the training examples; it may move before a resume, but not change
    dev: str = path_field("")  # source of the examples that choose the best checkpoint; empty: see `dev_share`
    test: str = path_field("")  # source of the examples that judge the best checkpoint, once at the end; empty: none
    dev_share: float = 0.1  # if `dev` is empty: the share of training examples set apart for it, by a hash of the text
    train_rows: int = 0  # train on only so many of the examples, chosen by the same hash; 0: on all
    # Names of the fields with the text: one or two; for tokens, one with a list of words; for spans, question, context.
    text: tuple[str, ...] = ("text",)
    label: str = "label"  # name of the field with the label; for spans it holds {"text": [...], "answer_start": [...]}
    # Names of the labels, in the order of their indices; empty: those that the source declares or, failing that, uses.
    label_names: tuple[str, ...] = ()
    # The first one decides which checkpoint is best; empty: accuracy, pearson, entity_f1 or span_f1, depending on kind.
    metrics: tuple[Metric, ...] = ()
    group_by_length: bool = False  # make batches of texts of similar length: less padding where lengths differ much
    max_length: int = 128  # tokens of a row; longer texts are cut, but for spans the context goes on in another row
    stride: int = 64  # for spans: how many tokens two successive rows of one context share
    max_answer: int = 30  # for spans: most tokens of an answer

    def __post_init__(self) -> None:
        fields = {"sequence": (1, 2), "regression": (1, 2), "tokens": (1,), "spans": (2,)}[self.kind]
        require(
            len(self.text) in fields,
            f"task.text names {len(self.text)} fields, but a task of {self.kind} has {' or '.join(map(str, fields))}.",
        )
        allowed = _METRICS_OF_KIND[self.kind]
        wrong = [name for name in self.metrics if name not in allowed]
        require(
            not wrong, f"task.metrics {', '.join(wrong)} cannot judge {self.kind}: choose from {', '.join(allowed)}."
        )
        require(0 < self.dev_share < 1, f"task.dev_share must be between 0 and 1, not {self.dev_share}.")
        for name, least in (("train_rows", 0), ("stride", 0), ("max_length", 8), ("max_answer", 1)):
            require_finite(f"task.{name}", getattr(self, name), least=least)
        require(
            self.kind != "spans" or self.stride < self.max_length,
            f"task.stride must be from 0 to below task.max_length {self.max_length}, not {self.stride}.",
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics; the first decides which checkpoint is best."""
        default = {"sequence": "accuracy", "regression": "pearson", "tokens": "entity_f1", "spans": "span_f1"}
        return self.metrics or (default[self.kind],)


@dataclass(frozen=True)
class StartConfig:
    """The encoder that fine-tuning starts from."""

    path: str = path_field("")  # a model folder, run folder or hub id; if it has a task's head, that is left out
    hidden_dropout: float = 0.1  # on the embeddings and on the output of every sublayer
    attention_dropout: float = 0.1  # on the attention probabilities
    head_dropout: float | None = None  # before the head's last layer; default: the published value, see `head_of`

    def __post_init__(self) -> None:
        for name in ("hidden_dropout", "attention_dropout", "head_dropout"):
            require_share(f"model.{name}", getattr(self, name) or 0.0)


# As in the published GLUE runs of BERT and DistilBERT. A task is small, so it is evaluated and saved once an epoch.
OPTIMIZER = OptimizerConfig(learning_rate=5e-5, beta2=0.999, eps=1e-8, warmup=0.1, clip=1.0)
SCHEDULE = TrainConfig(
    epochs=3.0, batch_rows=32, log_every=50, eval_every=0, eval_rows=0, checkpoint_every=0, keep_checkpoints=1
)


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run."""

    seed: int = 0  # for the head's initial parameters, the order of the examples, and dropout
    task: TaskConfig = TaskConfig()
    model: StartConfig = StartConfig()
    teacher: TeacherConfig = TeacherConfig()  # a model fine-tuned on the same task; an empty path: no teacher
    loss: TaskLossConfig = TaskLossConfig()
    optimizer: OptimizerConfig = OPTIMIZER
    train: TrainConfig = SCHEDULE
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        check_seeds(self.seed)
        require(bool(self.model.path), "model.path is empty: name the model folder, or the run, to fine-tune.")
        require(
            bool(self.task.train),
            "task.train is empty: name the training examples, a CSV, TSV, JSONL or Parquet file or hub:NAME.",
        )
        require(
            not self.loss.needs_teacher or bool(self.teacher.path),
            "loss.soft compares with a teacher: set teacher.path to a model that was fine-tuned on this task.",
        )


def head_of(task: TaskConfig, start: StartConfig, model: ModelConfig, label_names: tuple[str, ...]) -> HeadConfig:
    """The head for a task on an encoder.

    If no dropout is given, it is the published one: on a DistilBERT 0.2 for sequences and 0.1 for tokens and spans; on
    a BERT 0.1 for sequences and tokens and 0 for spans.

    Raises:
      InputError: the metric is "f1", and there are not two labels.
    """
    kind = "sequence" if task.kind == "regression" else task.kind
    distil = model.token_types == 0
    published = {"sequence": 0.2 if distil else 0.1, "tokens": 0.1, "spans": 0.1 if distil else 0.0}[kind]
    dropout = published if start.head_dropout is None else start.head_dropout
    labels = {"regression": 1, "spans": 2}.get(task.kind, len(label_names))
    two = "f1" not in task.metric_names or labels == 2
    require(two, f'The metric "f1" needs two labels, and this task has {labels}: set task.metrics to "macro_f1".')
    names = label_names if task.kind in ("sequence", "tokens") else ()
    return HeadConfig(kind, labels, dropout, names)


def check_head(head: HeadConfig, wanted: HeadConfig, model: str) -> None:
    """Raises `InputError` if a model's head differs from the task's in its kind, its labels or their order."""
    theirs, ours = (head.kind, head.labels), (wanted.kind, wanted.labels)
    same_names = not (head.label_names and wanted.label_names) or head.label_names == wanted.label_names
    require(
        theirs == ours and same_names,
        f"{model} was fine-tuned on another task ({' '.join(map(str, theirs))}: {', '.join(head.names[:5])}) than this "
        f"one ({' '.join(map(str, ours))}: {', '.join(wanted.names[:5])}): fine-tune it on the same task.",
    )


def task_encoder(start: StartConfig, model: ModelConfig, head: HeadConfig) -> ModelConfig:
    """The architecture of the encoder under the head, with the dropout rates of fine-tuning."""
    dropped = replace(model, hidden_dropout=start.hidden_dropout, attention_dropout=start.attention_dropout)
    return head.encoder(dropped)
