"""Training runs watched for what they show of their data: wrong labels, memorised and ambiguous examples."""

from vlearn.audit.example_numbers import ExampleNumbers
from vlearn.audit.findings import LabelIssues, label_issues
from vlearn.audit.metric_loggers import log_metrics
from vlearn.audit.recorder import Recorder
from vlearn.audit.scores import OutputScores, output_scores
from vlearn.audit.sweeps import Sweeps
from vlearn.audit.texts import TextDataset, read_texts

__all__ = [
    "ExampleNumbers",
    "LabelIssues",
    "OutputScores",
    "Recorder",
    "Sweeps",
    "TextDataset",
    "label_issues",
    "log_metrics",
    "output_scores",
    "read_texts",
]
