"""Sentences: read from what users have, and wrong labels of theirs found in a small transformer's training."""

import csv

import numpy as np
import pytest
import torch

import vlearn
from tests.audit.sentences import sentences
from vlearn.audit import TextDataset, read_texts

TEXTS, MOODS = sentences()


def test_words_are_numbered_by_frequency_and_padded():
    data = TextDataset(["a b a", "a c!", "  "], [0, 1, 1], max_length=3)
    assert data.vocabulary == {"a": 2, "b": 3, "c": 4, "!": 5} and data.vocabulary_size == 6
    assert [data[n]["input_ids"].tolist() for n in range(3)] == [[2, 3, 2], [2, 4, 5], [0, 0, 0]]
    assert data[1]["attention_mask"].tolist() == [1, 1, 1] and data[1]["labels"].item() == 1
    other = TextDataset(["c d a b a"], [0], max_length=3, vocabulary=data.vocabulary)
    assert other[0]["input_ids"].tolist() == [4, 1, 2]


def test_a_csv_file_is_read_by_its_columns(tmp_path):
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "review", "mood"), *zip(range(len(TEXTS)), TEXTS, MOODS, strict=True)])
    data = read_texts(path, text="review", label="mood")
    assert data.texts == TEXTS and data.names == ["bad", "good"]
    assert [data.names[label] for label in data.labels] == MOODS
    with pytest.raises(ValueError, match="has a row without 'text', but with 'id', 'review', 'mood'"):
        read_texts(path)
    path.write_text('text,label\n"a, b",10\nc,2\n', encoding="utf-8")
    data = read_texts(path)
    assert data.texts == ["a, b", "c"] and data.labels.tolist() == [10, 2] and len(data.names) == 11


def test_rows_and_hugging_face_datasets_are_read():
    rows = [{"text": text, "label": mood} for text, mood in zip(TEXTS, MOODS, strict=True)]
    assert read_texts(rows).texts == TEXTS
    datasets = pytest.importorskip("datasets")
    names = ["good", "bad"]  # not in their order
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    data = read_texts(datasets.Dataset.from_list(rows, features=features))
    assert data.names == names and [data.names[label] for label in data.labels] == MOODS


def test_a_tokenizer_of_the_users_takes_the_place_of_words():
    def tokenizer(texts, max_length, padding, truncation):
        ids = [[len(word) for word in text.split()][:max_length] for text in texts]
        ids = [row + [0] * (max_length - len(row)) for row in ids]
        return {"input_ids": ids, "attention_mask": [[int(n > 0) for n in row] for row in ids]}

    data = TextDataset(["one three", "a"], [0, 1], tokenizer=tokenizer, max_length=3)
    assert data[0]["input_ids"].tolist() == [3, 5, 0] and data.vocabulary is None and data.vocabulary_size == 6


@pytest.mark.parametrize(
    ("texts", "labels", "names", "message"),
    [
        (["a"], [0, 1], None, "1 texts and 2 labels"),
        ([], [], None, "0 texts and 0 labels"),
        (["a"], ["cat"], ["dog"], "label 'cat' is none of the classes dog"),
        (["a"], [2], ["dog", "cat"], "label 2 is none of the classes dog, cat"),
    ],
)
def test_what_is_no_data_is_refused(texts, labels, names, message):
    with pytest.raises(ValueError, match=message):
        TextDataset(texts, labels, names)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_wrong_labels_of_sentences_are_found_while_a_transformer_is_trained(tmp_path):
    transformers = pytest.importorskip("transformers")
    assert len(TEXTS) > 250 and len(set(TEXTS)) == len(TEXTS)
    wrong = np.random.default_rng(0).permutation(len(TEXTS))[: len(TEXTS) // 10]
    moods = list(MOODS)
    for n in wrong:
        moods[n] = "bad" if moods[n] == "good" else "good"
    data = TextDataset(TEXTS, moods, max_length=24)
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=data.vocabulary_size, dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=24
    )
    model = transformers.DistilBertForSequenceClassification(config)
    settings = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, num_train_epochs=8, learning_rate=3e-3, per_device_train_batch_size=16, **settings
    )
    callback = vlearn.integrations.transformers.SensitivityCallback(tmp_path / "run")
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    issues = vlearn.label_issues(callback.recorder.record)
    found = set(issues.numbers[: len(wrong)].tolist())
    assert len(found & set(wrong.tolist())) > 0.8 * len(wrong)
    assert issues.count == pytest.approx(len(wrong), rel=0.5)
    first = issues.columns(data.names)
    assert first["suggested"][0] == MOODS[first["number"][0]]


def test_a_csv_file_of_long_texts_is_read_and_one_of_another_encoding_refused(tmp_path):
    (tmp_path / "long.csv").write_text(f"text,label\n{'x' * 200_000},1\n")
    assert len(read_texts(tmp_path / "long.csv").texts[0]) == 200_000
    (tmp_path / "latin.csv").write_bytes("text,label\né,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv is not in UTF-8"):
        read_texts(tmp_path / "latin.csv")
