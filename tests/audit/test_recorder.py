"""What a recorder writes of a plain loop, against the same loop by hand; and that the loop is what it is without."""

import copy
import csv
import logging
import pickle
import random
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import vlearn
from vlearn.audit import Recorder, Sweeps
from vlearn.audit.metric_loggers import check_logger, log_metrics

N, C = 24, 3
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(2))
DATA = TensorDataset(X, Y)

OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "IVON": lambda model: vlearn.IVON(model, lr=0.1, ess=N, hess_init=0.5),
    "VON": lambda model: vlearn.VON(model, lr=0.05, ess=N),
}


OWN = ("IVON", "VON")  # vlearn's


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, C))


def loader(data=DATA, **settings):
    return DataLoader(data, 5, shuffle=True, **settings)


def train(model, optimizer, batches, outputs=None):
    for x, y in batches:
        optimizer.zero_grad()
        z = model(x)
        if outputs is not None:
            outputs.append((x, y, z.detach().clone()))
        F.cross_entropy(z, y).backward()
        optimizer.step()


def by_hand(outputs):
    """Averages of loss, margin, probability and agreement of every example, from what the loop saw itself."""
    seen = {name: [[] for _ in range(N)] for name in ("loss", "margin", "probability", "agreement")}
    for x, y, z in outputs:
        for row, label, logits in zip(x, y.tolist(), z.double(), strict=True):
            n = int((X == row).all(1).nonzero()[0, 0])
            others = logits[[k for k in range(C) if k != label]]
            seen["loss"][n].append(-logits.log_softmax(0)[label].item())
            seen["margin"][n].append((logits[label] - others.max()).item())
            seen["probability"][n].append(logits.softmax(0)[label].item())
            seen["agreement"][n].append(float(logits.argmax() == label))
    return {name: np.array([np.mean(v) if v else np.nan for v in values]) for name, values in seen.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_is_what_the_loop_saw(tmp_path, name, workers):
    model, outputs = network(), []
    optimizer = OPTIMIZERS[name](model)
    batches = loader(num_workers=workers, persistent_workers=workers > 0)
    with Recorder(tmp_path, model) as recorder:
        for _ in range(3):
            train(model, optimizer, recorder.follow(batches), outputs)
    record = recorder.record
    for column, expected in by_hand(outputs).items():
        np.testing.assert_allclose(record.column(column), expected, rtol=1e-5, atol=1e-6)
    assert record.column("count").tolist() == [3] * N
    assert record.memory.steps.tolist() == [5, 10, 15]
    np.testing.assert_array_equal(record.labels, Y)
    np.testing.assert_allclose(record.probabilities.sum(1), 1, rtol=1e-5)


def everything(model, optimizer, generators=True):
    """Weights, the optimizer's state, and the random states."""
    state = [*model.state_dict().values(), *_tensors(optimizer.state_dict())]
    if generators:
        np_state = np.random.get_state()
        state += [torch.get_rng_state(), torch.from_numpy(np_state[1].astype(np.int64)), torch.tensor(np_state[2])]
        state += [torch.tensor(random.getstate()[1])]
    return [tensor.clone() for tensor in state]


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Augmented(Dataset):
    """Noise by each of the three generators."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(6) + random.gauss(0, 0.1) + np.random.normal(0, 0.1), Y[i]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("data", [DATA, Augmented()], ids=["plain", "augmented"])
def test_a_run_with_a_recorder_is_bitwise_the_run_without(tmp_path, name, data):
    def run(recorded):
        random.seed(0)
        np.random.seed(0)
        model = network()
        optimizer, batches = OPTIMIZERS[name](model), loader(data)
        if not recorded:
            for _ in range(3):
                train(model, optimizer, batches)
            return everything(model, optimizer)
        options = {"self_influence_every": 2 if name in OWN else None, "sweeps": Sweeps(every=2, part=0.5)}
        with Recorder(tmp_path, model, optimizer, logger=tmp_path / "log.csv", **options) as recorder:
            for _ in range(3):
                train(model, optimizer, recorder.follow(batches))
                recorder.state_dict()
        assert recorder.record.memory.kinds.tolist() == ["live", "live", "sweep", "live"]
        return everything(model, optimizer)

    for with_it, without in zip(run(True), run(False), strict=True):
        assert torch.equal(with_it, without)


def test_the_live_self_influence_is_the_optimizers(tmp_path):
    model = network()
    optimizer = vlearn.IVON(model, lr=0.1, ess=N)
    with Recorder(tmp_path, model, optimizer, self_influence_every=1) as recorder:
        expected = np.zeros(N)
        for x, y in recorder.follow(loader()):
            train(model, optimizer, [(x, y)])
            places = [int((X == row).all(1).nonzero()[0, 0]) for row in x]
            expected[places] = optimizer.sensitivities().self_influence
    np.testing.assert_allclose(recorder.record.column("self_influence"), expected, rtol=1e-6)
    assert recorder.record.column("count").tolist() == [1] * N


def test_another_optimizer_has_none_and_a_warning_says_so_once(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["SGD"](model)
    with Recorder(tmp_path, model, optimizer, self_influence_every=1) as recorder:
        with pytest.warns(UserWarning, match="No live self-influence is recorded: SGD has none") as caught:
            train(model, optimizer, recorder.follow(loader()))
    assert len(caught) == 1 and np.isnan(recorder.record.column("self_influence")).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sweep_is_the_librarys_own(tmp_path, name):
    model = network()
    optimizer = OPTIMIZERS[name](model)
    with Recorder(tmp_path, model, optimizer, sweeps=Sweeps(2, options={"leverage": "exact"})) as recorder:
        for _ in range(2):
            train(model, optimizer, recorder.follow(loader()))
    memory = recorder.record.memory
    assert memory.kinds.tolist() == ["live", "live", "sweep"]
    if name in OWN:
        posterior = optimizer.posterior()
    else:
        generator = torch.Generator().manual_seed(0)
        batches = DataLoader(DATA, 5)
        posterior = vlearn.posterior.fit(model, batches, F.cross_entropy, num_data=N, generator=generator)
    table = vlearn.sweep(model, posterior, DataLoader(DATA, 5), F.cross_entropy, leverage="exact")
    for column in ("loss", "loo_loss", "leverage", "self_influence"):
        np.testing.assert_allclose(memory.column(column)[-1], getattr(table, column), rtol=1e-5)


def test_a_part_is_swept_the_same_each_time_by_the_numbers_of_the_whole(tmp_path):
    model = network()
    optimizer, part = OPTIMIZERS["IVON"](model), Subset(DATA, range(20, 4, -1))
    with Recorder(tmp_path, model, optimizer, dataset=DATA, sweeps=Sweeps(part=6)) as recorder:
        for _ in range(2):
            train(model, optimizer, recorder.follow(loader(part)))
    losses = recorder.record.memory.column("loss")[[1, 3]]
    swept = np.isfinite(losses)
    assert swept.sum(1).tolist() == [6, 6] and (swept[0] == swept[1]).all()
    assert set(np.flatnonzero(swept[0])) <= set(range(5, 21))
    model.eval()
    expected = F.cross_entropy(model(X), Y, reduction="none").detach().numpy()
    np.testing.assert_allclose(losses[1][swept[1]], expected[swept[1]], rtol=1e-5)
    assert recorder.record.column("count").tolist() == [0] * 5 + [2] * 16 + [0] * 3


def test_the_loss_of_held_out_data_stands_beside_every_sweep(tmp_path):
    model, held_out = network(), TensorDataset(X[:7].flip(0), Y[:7])
    optimizer = OPTIMIZERS["IVON"](model)
    sweeps = Sweeps(2, test=DataLoader(held_out, 4))
    with Recorder(tmp_path, model, optimizer, sweeps=sweeps) as recorder:
        for _ in range(2):
            train(model, optimizer, recorder.follow(loader()))
        expected = F.cross_entropy(model.eval()(held_out.tensors[0]), held_out.tensors[1]).item()
        recorder.begin_batch((X, Y), numbers=torch.arange(N))
        F.cross_entropy(model.train()(X), Y).backward()
        recorder.end_batch()
        recorder.end_epoch()
        recorder.end_epoch(test_loss=0.25)
    known = recorder.record.memory.test_loss
    np.testing.assert_allclose(known[recorder.record.memory.kinds == "sweep"], [expected, 0.25], rtol=1e-5)


def test_an_example_that_a_part_has_twice_is_swept_once(tmp_path):
    model = network()
    optimizer, part = OPTIMIZERS["IVON"](model), Subset(DATA, [3, 3, 1, 7])
    with Recorder(tmp_path, model, optimizer, dataset=DATA, sweeps=1) as recorder:
        train(model, optimizer, recorder.follow(loader(part)))
    assert np.flatnonzero(np.isfinite(recorder.record.memory.column("loss")[1])).tolist() == [1, 3, 7]
    assert recorder.record.column("count")[3] == 2


def test_an_epoch_without_a_step_or_a_batch_stops_nothing(tmp_path):
    model = network()
    with Recorder(tmp_path, model, num_data=N) as recorder:
        for _ in range(2):  # of an accumulation that goes on over epochs
            for batch, numbers in zip(DataLoader(DATA, 12), torch.arange(N).split(12), strict=True):
                recorder.begin_batch(batch, numbers=numbers)
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                recorder.end_batch(step=0)
            recorder.end_epoch(step=0)
        recorder.end_epoch(step=0)
    assert recorder.record.memory.steps.tolist() == [0, 1]
    assert recorder.record.column("count").sum() == 48


def test_another_dataset_may_be_swept_in_the_place_of_an_augmented_one(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["IVON"](model)
    with Recorder(tmp_path, model, optimizer, sweeps=Sweeps(dataset=DATA)) as recorder:
        train(model, optimizer, recorder.follow(loader(Augmented())))
    expected = F.cross_entropy(model.eval()(X), Y, reduction="none").detach()
    np.testing.assert_allclose(recorder.record.memory.column("loss")[1], expected, rtol=1e-5)
    other = network()
    optimizer = OPTIMIZERS["IVON"](other)
    with Recorder(tmp_path / "other", other, optimizer, sweeps=Sweeps(dataset=Subset(DATA, [1, 2]))) as recorder:
        with pytest.warns(UserWarning, match="the dataset to sweep has 2 examples, but .* has 24"):
            train(other, optimizer, recorder.follow(loader()))


def test_a_sweep_that_fails_warns_and_training_goes_on(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["IVON"](model)
    sweeps = Sweeps(options={"leverage": "wrong"})
    with Recorder(tmp_path, model, optimizer, sweeps=sweeps) as recorder:
        with pytest.warns(UserWarning, match="The data are not swept: ValueError: leverage='wrong'") as caught:
            for _ in range(2):
                train(model, optimizer, recorder.follow(loader()))
    assert len(caught) == 1 and recorder.record.memory.kinds.tolist() == ["live", "live"]


@pytest.mark.parametrize("stop", [5, 7], ids=["at the end of an epoch", "in the middle"])
def test_a_run_that_resumes_from_a_checkpoint_records_as_if_it_had_gone_on(tmp_path, stop):
    batches = [(X[n : n + 5], Y[n : n + 5]) for n in range(0, N, 5)]

    def run(path, steps, checkpoint=None):
        """Steps from a checkpoint, or the beginning, as a loop that skips what it has been through."""
        model = network()
        optimizer = OPTIMIZERS["AdamW"](model)
        recorder = Recorder(
            path, model, key=lambda batch: [int((X == row).all(1).nonzero()[0, 0]) for row in batch[0]], num_data=N
        )
        start = 0
        if checkpoint is not None:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            recorder.load_state_dict(checkpoint["recorder"])
            torch.set_rng_state(checkpoint["rng"])
            start = checkpoint["step"]
        for step in range(start, steps):
            batch = batches[step % 5]
            recorder.begin_batch(batch)
            train(model, optimizer, [batch])
            recorder.end_batch()
            if step % 5 == 4:
                recorder.end_epoch()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recorder": recorder.state_dict()}
        return recorder, {**state, "rng": torch.get_rng_state(), "step": steps}

    whole, _ = run(tmp_path / "whole", 13)
    _, checkpoint = run(tmp_path / "part", stop)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    run(tmp_path / "part", 12, copy.deepcopy(checkpoint))  # is killed later
    part, _ = run(tmp_path / "part", 13, torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert part.record.memory.steps.tolist() == whole.record.memory.steps.tolist() == [5, 10]
    for column in ("loss", "margin", "count"):
        np.testing.assert_allclose(part.record.column(column), whole.record.column(column), rtol=1e-12)
        np.testing.assert_array_equal(part.record.memory.column(column), whole.record.memory.column(column))
    np.testing.assert_allclose(part.record.probabilities, whole.record.probabilities)


def test_a_checkpoint_in_the_body_of_the_loop_has_its_batch(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["SGD"](model)
    recorder = Recorder(tmp_path, model)
    for n, (x, y) in enumerate(recorder.follow(loader()), 1):
        train(model, optimizer, [(x, y)])
        assert recorder.state_dict()["batches"] == n
    assert recorder.record.column("count").tolist() == [1] * N


def test_a_record_is_continued_in_its_folder(tmp_path):
    for _ in range(2):
        model = network()
        with Recorder(tmp_path, model) as recorder:
            train(model, OPTIMIZERS["SGD"](model), recorder.follow(loader()))
    assert recorder.record.column("count").tolist() == [2] * N
    assert recorder.record.memory.steps.tolist() == [5, 10]
    with Recorder(tmp_path, model, overwrite=True) as recorder:
        train(model, OPTIMIZERS["SGD"](model), recorder.follow(loader()))
    assert recorder.record.column("count").tolist() == [1] * N


def test_an_interrupted_loop_leaves_what_it_saw(tmp_path):
    model = network()
    with pytest.raises(KeyboardInterrupt):
        with Recorder(tmp_path, model) as recorder:
            for n, (x, y) in enumerate(recorder.follow(loader())):
                train(model, OPTIMIZERS["SGD"](model), [(x, y)])
                if n == 2:
                    raise KeyboardInterrupt
    assert vlearn.TrainingRecord.open(tmp_path).column("count").sum() == 10
    assert len(model._forward_hooks) == 0


def test_draws_of_a_closure_are_views_of_their_examples(tmp_path):
    model = network()
    optimizer = vlearn.IVON(model.parameters(), lr=0.1, ess=N, mc_samples=3)
    with Recorder(tmp_path, model) as recorder:
        for x, y in recorder.follow(loader()):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert recorder.record.column("count").tolist() == [3] * N


def test_evaluation_and_forward_passes_without_gradients_are_not_recorded(tmp_path):
    model, outputs = network(), []
    optimizer = OPTIMIZERS["SGD"](model)
    with Recorder(tmp_path, model) as recorder:
        for x, y in recorder.follow(loader()):
            train(model, optimizer, [(x, y)], outputs)
            with torch.no_grad():
                model(x)
            model.eval()(x)
            model.train()
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(outputs)["loss"], rtol=1e-5)


UNLABELLED = torch.randn(N, 6, generator=torch.Generator().manual_seed(4))


class Heads(nn.Module):
    """Classes, and whether an example is of the training data."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.classes, self.domain = nn.Linear(6, 5), nn.Linear(5, C), nn.Linear(5, 2)

    def forward(self, x):
        z = self.features(x).tanh()
        return self.classes(z), self.domain(z)


def of_domains(model, x, y, u):
    (classes, own), (_, other) = model(x), model(u)
    domains = torch.cat([torch.zeros(len(x)), torch.ones(len(u))]).long()
    return classes, F.cross_entropy(classes, y) + F.cross_entropy(torch.cat([own, other]), domains)


def of_sure_labels(model, x, y, u, first=False):
    other = model(u) if first else None
    z = model(x)
    other = model(u) if other is None else other
    p, guessed = other.detach().softmax(1).max(1)
    return z, F.cross_entropy(z, y) + (F.cross_entropy(other, guessed, reduction="none") * (p > 0.5)).mean()


SEVERAL_PASSES = {
    "domains": (Heads, of_domains),
    "guessed labels": (network, of_sure_labels),
    "guessed labels first": (network, lambda *given: of_sure_labels(*given, first=True)),
    "a sum over another pass": (network, lambda m, x, y, u: (z := m(x), F.cross_entropy(z, y) + m(u).exp().mean())),
}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_forward_passes_of_other_examples_are_not_recorded(tmp_path, name, copies):
    """Also where the loop gives the model copies, as on another device."""
    make, forward = SEVERAL_PASSES[name]
    model, outputs = make(), []
    optimizer = OPTIMIZERS["AdamW"](model)
    with Recorder(tmp_path, model, output=0 if make is Heads else None) as recorder:
        for _ in range(6):
            others = loader(TensorDataset(UNLABELLED))
            for (x, y), (u,) in zip(recorder.follow(loader()), others, strict=True):
                z, loss = forward(model, x.double().float() if copies else x, y, u)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                outputs.append((x, y, z.detach().clone()))
    assert recorder.record.column("count").tolist() == [6] * N
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(outputs)["loss"], rtol=1e-5)


def test_views_that_the_loop_makes_are_averaged(tmp_path):
    model, outputs = network(), []
    with Recorder(tmp_path, model) as recorder:
        for x, y in recorder.follow(loader()):
            views = [model(x + 0.1 * torch.randn_like(x)) for _ in range(2)]
            sum(F.cross_entropy(z, y) for z in views).backward()
            outputs += [(x, y, z.detach()) for z in views]
    assert recorder.record.column("count").tolist() == [2] * N
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(outputs)["loss"], rtol=1e-5)


@pytest.mark.parametrize("is_permuted", [False, True])
def test_a_batch_that_the_loop_takes_in_parts_is_recorded_whole(tmp_path, is_permuted):
    model, outputs = network(), []
    optimizer = OPTIMIZERS["SGD"](model)
    with Recorder(tmp_path, model) as recorder:
        for x, y in recorder.follow(DataLoader(DATA, 10, shuffle=True)):
            optimizer.zero_grad()
            order = torch.arange(len(x)).flip(0) if is_permuted else torch.arange(len(x))
            for x_part, y_part in zip(x[order].split(4), y[order].split(4), strict=True):
                z = model(x_part)
                (F.cross_entropy(z, y_part) / 3).backward()
                outputs.append((x_part, y_part, z.detach().clone()))
            optimizer.step()
            if is_permuted:
                break
        if is_permuted:  # whose they are is not known
            with pytest.raises(ValueError, match="the output has 4 rows for 10 examples"):
                recorder.end_batch()
            return
    assert recorder.record.column("count").tolist() == [1] * N
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(outputs)["loss"], rtol=1e-5)


def test_a_record_is_not_continued_with_other_labels(tmp_path):
    model = network()
    with Recorder(tmp_path, model) as recorder:
        train(model, OPTIMIZERS["SGD"](model), recorder.follow(loader()))
    loss, corrected = (
        recorder.record.column("loss"),
        TensorDataset(X, torch.where(torch.arange(N) == 7, (Y + 1) % C, Y)),
    )
    message = f"in which example 7 has the label {Y[7]}, but now it is {corrected[7][1]}: .* give overwrite=True"
    with pytest.raises(ValueError, match=message), Recorder(tmp_path, model) as recorder:
        train(model, OPTIMIZERS["SGD"](model), recorder.follow(DataLoader(corrected, N)))
    np.testing.assert_array_equal(vlearn.TrainingRecord.open(tmp_path).column("loss"), loss)
    with Recorder(tmp_path, model, overwrite=True) as recorder:
        train(model, OPTIMIZERS["SGD"](model), recorder.follow(loader(corrected)))
    assert not recorder.record.averages.relabelled.any()


class Turning(Dataset):
    """Every third label is another in each pass."""

    passes = 0

    def __len__(self):
        return N

    def __getitem__(self, n):
        self.passes += n == 0
        return X[n], (Y[n] + self.passes) % C if n % 3 == 0 else Y[n]


def test_labels_that_change_are_warned_of_once(tmp_path):
    """Also in a run that goes on from there."""
    model, data = network(), Turning()
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="8 examples, as 0, have come with other labels than before") as warned,
            Recorder(tmp_path, model) as recorder,
        ):
            for _ in range(3):
                train(model, OPTIMIZERS["SGD"](model), recorder.follow(DataLoader(data, 5)))
        assert len(warned) == 1
    relabelled = vlearn.TrainingRecord.open(tmp_path).averages.relabelled
    assert relabelled.nonzero()[0].tolist() == list(range(0, N, 3))


class Two(nn.Module):
    """Features and a head; the loop calls them apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, C)

    def forward(self, x):
        z = self.features(x)
        return {"logits": self.head(z), "features": z}


@pytest.mark.parametrize("options", [{}, {"output": "logits"}, {"module": "head"}], ids=str)
def test_the_output_is_the_logits_or_what_is_named(tmp_path, options):
    model, seen = Two(), []
    with Recorder(tmp_path, model, **options) as recorder:
        for x, y in recorder.follow(loader()):
            z = model(x)["logits"]
            seen.append((x, y, z.detach()))
            F.cross_entropy(z, y).backward()
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(seen)["loss"], rtol=1e-5)


class Rows(IterableDataset):
    def __iter__(self):
        for n in (3, 1, 23, 3):
            yield {"x": X[n], "label": Y[n], "row": n}


def test_a_stream_is_recorded_by_its_key(tmp_path):
    model = network()
    with Recorder(tmp_path, model, key="row", num_data=N) as recorder:
        for batch in recorder.follow(DataLoader(Rows(), 2)):
            F.cross_entropy(model(batch["x"]), batch["label"]).backward()
    assert recorder.record.column("count").nonzero()[0].tolist() == [1, 3, 23]
    assert recorder.record.column("count")[3] == 2


def test_sequences_are_recorded_by_the_mean_of_their_tokens(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    tokens = torch.randint(0, 7, (8, 5))
    targets = tokens.clone()
    targets[:, 3:] = -100
    with Recorder(tmp_path, model) as recorder:
        for x, y in recorder.follow(DataLoader(TensorDataset(tokens, targets), 4, shuffle=True)):
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    expected = F.cross_entropy(model(tokens).movedim(2, 1), targets, reduction="none").sum(1) / 3
    np.testing.assert_allclose(recorder.record.column("loss"), expected.detach(), rtol=1e-5)
    assert recorder.record.probabilities is None


@pytest.mark.parametrize("first", [4, 7], ids=["known by an earlier batch", "told"])
def test_sequences_as_long_as_there_are_classes_are_recorded(tmp_path, first):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    batches = [(tokens, tokens.roll(1)) for tokens in (torch.randint(0, 7, (3, length)) for length in (first, 7))]
    with Recorder(tmp_path, model, num_data=6, classes_last=True if first == 7 else None) as recorder:
        for x, y in recorder.follow(batches):
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    expected = [F.cross_entropy(model(x).movedim(2, 1), y, reduction="none").mean(1) for x, y in batches]
    np.testing.assert_allclose(recorder.record.column("loss"), torch.cat(expected).detach(), rtol=1e-5)


def test_a_regression_records_the_loss_that_is_named(tmp_path):
    model, y = nn.Linear(6, 1), torch.randn(N, 1)
    with Recorder(tmp_path, model, loss_fn=F.mse_loss) as recorder:
        for x, target in recorder.follow(loader(TensorDataset(X, y))):
            F.mse_loss(model(x), target).backward()
    expected = ((model(X) - y) ** 2).detach().squeeze(1)
    np.testing.assert_allclose(recorder.record.column("loss"), expected, rtol=1e-4, atol=1e-7)
    assert np.isnan(recorder.record.column("margin")).all()


def test_a_compiled_model_is_recorded(tmp_path):
    model, outputs = network(), []
    compiled = torch.compile(model, backend="eager")
    with Recorder(tmp_path, compiled) as recorder:
        train(compiled, OPTIMIZERS["SGD"](model), recorder.follow(loader()), outputs)
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(outputs)["loss"], rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_compiles_itself_is_recorded(tmp_path):
    model, outputs = network(), []
    with Recorder(tmp_path, model) as recorder:
        model.compile(backend="eager")
        train(model, OPTIMIZERS["SGD"](model), recorder.follow(loader()), outputs)
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(outputs)["loss"], rtol=1e-5)


def test_outputs_that_the_loop_writes_to_after_a_step_are_recorded_as_they_were(tmp_path):
    model, before, seen = network(), None, []
    with Recorder(tmp_path, model) as recorder:
        for x, y in recorder.follow(loader()):
            if before is not None:
                before.zero_()
            z = model(x)
            F.cross_entropy(z, y).backward()
            seen.append((x, y, z.detach().clone()))
            before = z.detach()
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(seen)["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_may_be_made_after_the_recorder(tmp_path, name):
    def run(recorded):
        model = network()
        recorder = Recorder(tmp_path, model) if recorded else None
        optimizer, batches = OPTIMIZERS[name](model), loader()
        train(model, optimizer, batches if recorder is None else recorder.follow(batches))
        return everything(model, optimizer)

    for with_it, without in zip(run(True), run(False), strict=True):
        assert torch.equal(with_it, without)


def test_a_loader_that_is_made_anew_for_each_epoch_is_followed(tmp_path):
    model, outputs = network(), []
    with Recorder(tmp_path, model, dataset=DATA) as recorder:
        for _ in range(3):
            train(model, OPTIMIZERS["SGD"](model), recorder.follow(loader()), outputs)
    np.testing.assert_allclose(recorder.record.column("loss"), by_hand(outputs)["loss"], rtol=1e-5)


def test_copies_of_the_model_have_no_hooks_that_record(tmp_path):
    model = network()
    with Recorder(tmp_path, model) as recorder:
        for x, y in recorder.follow(loader()):
            copied = copy.deepcopy(model)
            copied.train()(x), pickle.loads(pickle.dumps(model)).train()(x)
            F.cross_entropy(model(x), y).backward()
    assert recorder.record.column("count").tolist() == [1] * N


class TestRefusals:
    def test_a_model_that_the_loop_does_not_call(self, tmp_path):
        recorder = Recorder(tmp_path, network())
        other = network()
        with pytest.raises(ValueError, match="the batch saw no forward pass of the model"):
            train(other, OPTIMIZERS["SGD"](other), recorder.follow(loader()))

    def test_two_loaders_by_turns(self, tmp_path):
        model = network()
        recorder, optimizer = Recorder(tmp_path, model), OPTIMIZERS["SGD"](model)
        first, second = iter(recorder.follow(loader())), iter(recorder.follow(loader()))
        for batches in (first, second):
            train(model, optimizer, [next(batches)])
        with pytest.raises(ValueError, match="two loaders are followed by turns"):
            next(first)

    def test_an_output_of_other_examples(self, tmp_path):
        model = network()
        recorder = Recorder(tmp_path, model)
        with pytest.raises(ValueError, match="the output has 10 rows for 5 examples"):
            for x, y in recorder.follow(loader()):
                F.cross_entropy(model(torch.cat([x, x])), torch.cat([y, y])).backward()

    def test_a_regression_without_its_loss(self, tmp_path):
        model = nn.Linear(6, 1)
        recorder = Recorder(tmp_path, model)
        with pytest.raises(ValueError, match="give the training loss as loss_fn"):
            for x, y in recorder.follow(loader(TensorDataset(X, torch.randn(N, 1)))):
                F.mse_loss(model(x), y).backward()

    def test_a_binary_label_that_the_loop_compares_with_a_squeezed_output(self, tmp_path):
        model, loss_fn = nn.Linear(X.shape[1], 1), nn.BCEWithLogitsLoss()
        data = TensorDataset(X, (Y > 0).float())
        recorder = Recorder(tmp_path, model, loss_fn=loss_fn)
        with pytest.raises(ValueError, match=r"as by output=lambda output: output.squeeze\(1\)"):
            for x, y in recorder.follow(loader(data)):
                loss_fn(model(x).squeeze(1), y).backward()
        recorder.close()
        recorder = Recorder(tmp_path / "run", model, loss_fn=loss_fn, output=lambda output: output.squeeze(1))
        for x, y in recorder.follow(loader(data)):
            loss_fn(model(x).squeeze(1), y).backward()
        expected = F.binary_cross_entropy_with_logits(model(X).squeeze(1), (Y > 0).float(), reduction="none")
        np.testing.assert_allclose(recorder.record.column("loss"), expected.detach(), rtol=1e-5)

    def test_an_output_that_was_written_to(self, tmp_path):
        model = network()
        recorder = Recorder(tmp_path, model)
        with pytest.raises(RuntimeError, match="was written to in place"):
            for x, y in recorder.follow(loader()):
                F.cross_entropy(model(x).div_(2), y).backward()

    def test_a_batch_of_more_entries_until_its_targets_are_named(self, tmp_path):
        data = TensorDataset(X, Y, torch.rand(N), torch.rand(N))
        model = network()
        recorder = Recorder(tmp_path, model)
        with pytest.raises(ValueError, match="batch of 4 entries.* Or give targets=, a callable"):
            next(iter(recorder.follow(loader(data))))
        recorder = Recorder(tmp_path, model, targets=lambda batch: batch[1])
        for x, y, *_ in recorder.follow(loader(data)):
            F.cross_entropy(model(x), y).backward()
        assert recorder.record.column("count").tolist() == [1] * N

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"module": "3.weight"}, "module='3.weight', but the model has none of that name: use one of '0', '1'"),
            ({"self_influence_every": 0}, "self_influence_every=0, but it must be positive"),
            ({"num_data": 3, "dataset": DATA}, "num_data=3, but the dataset has 24 examples"),
            ({"sweeps": 0}, "every=0, but it must be positive"),
            ({"sweeps": [1, 3]}, r"sweeps=\[1, 3\], but it must be a number of epochs, or vlearn.audit.Sweeps"),
            ({"targets": "y"}, "targets='y', but it must be a callable"),
            ({"loss_fn": nn.CrossEntropyLoss}, r"loss_fn is the class CrossEntropyLoss.*: pass CrossEntropyLoss\(\)"),
            ({"logger": logging.getLogger()}, "logger is a RootLogger, but it must have log_metrics"),
        ],
    )
    def test_bad_arguments(self, tmp_path, options, message):
        with pytest.raises((ValueError, TypeError), match=message):
            Recorder(tmp_path / "run", network(), **options)
        assert not (tmp_path / "run").exists()

    def test_arguments_in_another_order(self, tmp_path):
        model = network()
        with pytest.raises(TypeError, match="path is a Sequential, but it must be the folder"):
            Recorder(model, torch.optim.SGD(model.parameters(), 0.1))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model is a SGD, but it must be an nn.Module"):
            Recorder(tmp_path, torch.optim.SGD(model.parameters(), 0.1))  # type: ignore[arg-type]
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file, but it must be the folder"):
            Recorder(tmp_path / "file", model)

    def test_what_is_no_loader(self, tmp_path):
        recorder = Recorder(tmp_path / "run", network())
        with pytest.raises(ValueError, match="which gives single examples: follow DataLoader"):
            recorder.follow(DATA)
        with pytest.raises(ValueError, match="give key=.* enumerate and zip go around follow"):
            recorder.follow(enumerate(loader()))
        with pytest.raises(ValueError, match="num_data=3, but the dataset has 24 examples"):
            Recorder(tmp_path / "run", network(), num_data=3).follow(loader())
        assert not (tmp_path / "run").exists()

    def test_a_logger_of_no_known_kind(self, tmp_path):
        with pytest.raises(TypeError, match="logger is a int, but it must have log_metrics"):
            Recorder(tmp_path, network(), logger=3)


class TestLoggers:
    def test_each_in_its_own_way(self, tmp_path):
        got = []
        lightning = SimpleNamespace(log_metrics=lambda metrics, step=None: got.append(("lightning", metrics, step)))
        tensorboard = SimpleNamespace(add_scalar=lambda name, value, step: got.append((name, value, step)))
        trackio = SimpleNamespace(log=lambda metrics, step=None: got.append(("trackio", metrics, step)))
        trainer = SimpleNamespace(log=lambda metrics: got.append(("trainer", metrics)))
        path = tmp_path / "logs" / "log.csv"
        loggers = [lightning, tensorboard, trackio, trainer, lambda metrics, step: got.append(("call", step)), path]
        check_logger(loggers)
        log_metrics(loggers, {"a": 1.0}, 7)
        log_metrics(path, {"a": 2.0, "b": 3.0}, 8)
        assert got == [
            ("lightning", {"a": 1.0}, 7),
            ("a", 1.0, 7),
            ("trackio", {"a": 1.0}, 7),
            ("trainer", {"a": 1.0}),
            ("call", 7),
        ]
        with path.open() as file:
            rows = list(csv.reader(file))
        assert rows == [["step", "name", "value"], ["7", "a", "1.0"], ["8", "a", "2.0"], ["8", "b", "3.0"]]

    def test_wandbs_own_rows_are_not_shifted(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        for folder in ("DATA", "CACHE", "CONFIG"):
            monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path / folder.lower()))
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
        run = wandb.init(mode="offline", dir=tmp_path, settings=settings)
        try:
            run.log({"mine": 1.0}, step=100)
            log_metrics(run, {"vlearn/loss": 0.5}, 7)
            assert run.summary["vlearn/loss"] == 0.5 and run.summary["vlearn/step"] == 7
        finally:
            run.finish()

    def test_tensorboards_writer(self, tmp_path):
        tensorboard = pytest.importorskip("torch.utils.tensorboard")
        with tensorboard.SummaryWriter(tmp_path) as writer:
            log_metrics(writer, {"vlearn/loss": 0.5}, 7)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        read = EventAccumulator(str(tmp_path))
        read.Reload()
        assert [(event.step, event.value) for event in read.Scalars("vlearn/loss")] == [(7, 0.5)]

    def test_a_run_logs_its_summary_after_each_epoch(self, tmp_path):
        model, got = network(), []
        optimizer = OPTIMIZERS["IVON"](model)
        options = {"sweeps": 2, "logger": lambda metrics, step: got.append((metrics, step))}
        with Recorder(tmp_path, model, optimizer, **options) as recorder:
            for _ in range(2):
                train(model, optimizer, recorder.follow(loader()))
        assert [step for _, step in got] == [5, 10]
        assert got[1][0]["vlearn/loss"] == pytest.approx(recorder.record.column("loss").mean())
        assert "vlearn/sweep_loo_loss" in got[1][0] and "vlearn/sweep_loo_loss" not in got[0][0]


def causal_model(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(classes, 6), nn.Linear(6, classes))


def in_two(z, y):
    """An example's loss mixed with that of the one before it, as mixup has it."""
    return 0.3 * F.cross_entropy(z, y) + 0.7 * F.cross_entropy(z, y.roll(1))


WORDS = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(3))
OTHER_LABELS = {
    "shifted": (network, DATA, lambda model, x, y: F.cross_entropy(model(x), (y + 1) % C)),
    "permuted": (network, DATA, lambda model, x, y: F.cross_entropy(model(x.flip(0)), y.flip(0))),
    "mixed": (network, DATA, lambda model, x, y: in_two(model(0.3 * x + 0.7 * x.roll(1, 0)), y)),
    "the next word's": (
        lambda: causal_model(7),
        TensorDataset(WORDS, WORDS),
        lambda model, x, y: F.cross_entropy(model(x)[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ),
}


@pytest.mark.parametrize("weight", [None, torch.tensor(3.0)])
@pytest.mark.parametrize("width", [0, 1, 4])
@pytest.mark.parametrize("is_permuted", [True, False])
def test_binary_labels_that_the_loss_does_not_ask_for_are_warned_of(width, is_permuted, weight, tmp_path):
    """Also where the loop squeezes the output (0)."""
    torch.manual_seed(0)
    model, y = nn.Linear(6, width or 1), (X[:, :width] > 0).float() if width else (X[:, 0] > 0).float()

    def selected(output):
        return output if width else output.squeeze(1)

    loss = nn.BCEWithLogitsLoss(pos_weight=weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    warned = (
        pytest.warns(UserWarning, match="the training's loss asks .* for another") if is_permuted else nullcontext()
    )
    with warned, Recorder(tmp_path, model, loss_fn=loss, output=selected) as recorder:
        for _ in range(6):
            for x, target in recorder.follow(DataLoader(TensorDataset(X, y), 6, shuffle=True)):
                optimizer.zero_grad()
                order = torch.arange(len(x)).roll(1) if is_permuted else torch.arange(len(x))
                loss(selected(model(x[order])), target[order]).backward()
                optimizer.step()


@pytest.mark.parametrize("name", OTHER_LABELS)
def test_labels_that_the_loss_does_not_ask_for_are_warned_of(name, tmp_path):
    make, data, loss_of = OTHER_LABELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with (
        pytest.warns(UserWarning, match="the training's loss asks .* for another class") as warned,
        Recorder(tmp_path, model, classes_last=True) as recorder,
    ):
        for _ in range(3):
            for x, y in recorder.follow(loader(data)):
                optimizer.zero_grad()
                loss_of(model, x, y).backward()
                optimizer.step()
    assert len(warned) == 1


def focal(z, y):
    p = z.softmax(1).gather(1, y[:, None])
    return -((1 - p).square() * p.log()).mean()


ITS_LABELS = {
    "scaled": lambda z, y: 2.0**16 * F.cross_entropy(z, y, reduction="sum"),
    "smooth": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.4),
    "of weighed classes": lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([0.0, 1.0, 9.0])),
    "focal": focal,
    "a margin": F.multi_margin_loss,
    "squared": lambda z, y: F.mse_loss(z, F.one_hot(y, C).float()),
    "with a penalty": lambda z, y: F.cross_entropy(z, y) + 0.01 * z.square().mean(),
    "none": lambda z, y: 0 * F.cross_entropy(z, y),
}


@pytest.mark.parametrize("name", ITS_LABELS)
def test_losses_of_the_labels_are_not_warned_of(name, tmp_path):
    """Also once the model has fitted them."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for path in ("first", "then"):
        with Recorder(tmp_path / path, model) as recorder:
            for _ in range(20):
                for x, y in recorder.follow(loader()):
                    optimizer.zero_grad()
                    ITS_LABELS[name](model(x), y).backward()
                    optimizer.step()


def test_gradients_are_looked_at_in_the_first_batches_alone(tmp_path):
    """Also where there are no labels to check."""
    model = nn.Linear(6, 1)
    data = TensorDataset(X, X[:, :1])
    with Recorder(tmp_path, model, loss_fn=nn.MSELoss()) as recorder:
        for _ in range(5):
            for x, y in recorder.follow(loader(data)):
                output = model(x)
                F.mse_loss(output, y).backward()
    assert not output._backward_hooks
