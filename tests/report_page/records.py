"""Records to make pages of, and what a stranger may have written into the data."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np

from vlearn import TrainingRecord
from vlearn.audit import TextDataset

HOSTILE = (
    '</script><img src=x onerror="window.hacked=1">',
    "<!--<script>",
    "%%SCRIPTS%% {{x}} ${alert(1)} &lt;b&gt; \u2028 ]]>",
    '=HYPERLINK("http://example.org";"x")',
    "javascript:window.hacked=1",
)


def hostile_texts(num_data: int) -> TextDataset:
    """Texts and names of classes that would do harm as HTML, script or formula."""
    texts = [f"{HOSTILE[n % len(HOSTILE)]} sentence {n}" for n in range(num_data)]
    return TextDataset(texts, [n % 3 for n in range(num_data)], names=[HOSTILE[0], HOSTILE[1], HOSTILE[3]])


def recorded(path: str | os.PathLike[str], num_data: int, epochs: int) -> TrainingRecord:
    """A record of averages and sweeps of three classes; every seventh label is wrong and never believed."""
    draws = np.random.default_rng(0)
    record = TrainingRecord(num_data, path, overwrite=True)
    labels, index = np.arange(num_data) % 3, np.arange(num_data)
    wrong = index % 7 == 0
    predicted = np.where(wrong, (labels + 1) % 3, labels)
    for epoch in range(epochs):
        p = np.clip(draws.beta(8, 2, num_data) * (0.4 + 0.6 * (epoch + 1) / epochs), 0.01, 0.99)
        own = np.where(wrong, 0.15 * (1 - p), p)
        probabilities = np.repeat((1 - own)[:, None] / 10, 3, 1)
        probabilities[index, predicted] = 1 - own
        probabilities[index, labels] = own
        probabilities /= probabilities.sum(1, keepdims=True)
        record.record(
            index,
            step=10 * (epoch + 1),
            predicted=predicted,
            label=labels,
            probabilities=probabilities,
            loss=-np.log(own),
            margin=np.log(own / (1 - own)),
            probability=own,
            agreement=(predicted == labels).astype(float),
        )
        record.new_snapshot()
        leverage = 0.3 * own * (1 - own) * draws.uniform(0.5, 1.5, num_data)
        columns = {"loss": -np.log(own), "loo_loss": -np.log(own) + leverage, "self_influence": leverage * (1 - own)}
        columns |= {"leverage": leverage, "prediction_error": 1 - own}
        record.record_sweep(record.step, SimpleNamespace(index=index, **columns), test_loss=1 / (epoch + 1))
    return record
