"""Label issues of records and tables: against counts by hand, the peer, and labels that are known to be wrong."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from vlearn.audit.confident_learning import confident_joint, noise_joint

C = 3


def noisy(count, share, seed=0, classes=C):
    """Given labels, true labels and probabilities of a model that mostly knows the truth."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, count)
    given = np.where(rng.random(count) < share, (true + 1) % classes, true)
    logits = rng.normal(size=(count, classes)) + 3 * np.eye(classes)[true]
    return given, true, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def joint_in_words(labels, probabilities):
    classes = probabilities.shape[1]
    thresholds = [np.mean([p[j] for p, y in zip(probabilities, labels, strict=True) if y == j]) for j in range(classes)]
    counts = np.zeros((classes, classes), int)
    for p, y in zip(probabilities, labels, strict=True):
        confident = [j for j in range(classes) if p[j] >= thresholds[j]]
        if confident:
            counts[y, max(confident, key=lambda j: p[j])] += 1
    return counts


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_the_confident_joint_is_the_papers(share):
    labels, _, probabilities = noisy(200, share)
    np.testing.assert_array_equal(confident_joint(labels, probabilities), joint_in_words(labels, probabilities))


def test_the_confident_joint_is_cleanlabs():
    count = pytest.importorskip("cleanlab").count
    for seed, share in itertools.product(range(3), (0.05, 0.3)):
        labels, _, probabilities = noisy(500, share, seed, classes=5)
        theirs = count.compute_confident_joint(labels, probabilities, calibrate=False)
        ours = confident_joint(labels, probabilities)
        assert np.abs(theirs - ours).sum() <= 2  # it takes ties, and the most probable class, somewhat otherwise
        joint = count.estimate_joint(labels, probabilities, confident_joint=ours)
        # It rounds to whole examples.
        np.testing.assert_allclose(noise_joint(labels, probabilities), joint, atol=1 / 500)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_joint_estimates_the_share_of_wrong_labels(share):
    labels, true, probabilities = noisy(20_000, share)
    joint = noise_joint(labels, probabilities)
    assert joint.sum() == pytest.approx(1)
    np.testing.assert_allclose(joint.sum(1), np.bincount(labels) / len(labels))
    assert 1 - np.trace(joint) == pytest.approx(np.mean(labels != true), abs=0.01)


def test_a_class_without_examples_is_never_suggested_by_counts():
    labels, _, probabilities = noisy(200, 0.2, classes=4)
    labels[labels == 3] = 0
    counts = confident_joint(labels, probabilities)
    assert counts[3].sum() == counts[:, 3].sum() == 0
    assert noise_joint(labels, probabilities).sum() == pytest.approx(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A record and a sweep of a run on three clusters that hardly overlap, with every tenth label wrong."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    true = torch.from_numpy(rng.integers(0, C, 300))
    x = torch.randn(300, 5) + 5 * torch.eye(5)[true]
    wrong = rng.permutation(300)[:30]
    given = true.clone()
    given[wrong] = (given[wrong] + 1) % C
    data = TensorDataset(x, given)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, C))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with vlearn.Recorder(tmp_path_factory.mktemp("run"), model) as recorder:
        for _ in range(15):
            for inputs, labels in recorder.follow(DataLoader(data, 32, shuffle=True)):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
    loader = DataLoader(data, 100)
    posterior = vlearn.posterior.fit(model, loader, F.cross_entropy)
    table = vlearn.sweep(model, posterior, loader, F.cross_entropy, leverage="exact")
    return recorder.record, table, given, true, set(wrong.tolist())


@pytest.mark.parametrize("of", ["record", "table"])
def test_wrong_labels_come_first_with_the_right_suggestion(run, of):
    record, table, given, true, wrong = run
    issues = vlearn.label_issues(record) if of == "record" else vlearn.label_issues(table, given)
    assert len(issues) == 300 and (np.diff(issues.score) <= 0).all()
    first = issues.numbers[:30]
    assert len(wrong & set(first.tolist())) >= 24
    found = [n for n in first.tolist() if n in wrong]
    suggested = dict(zip(issues.numbers.tolist(), issues.suggested.tolist(), strict=True))
    assert np.mean([suggested[n] == int(true[n]) for n in found]) > 0.9
    np.testing.assert_array_equal(issues.given, given[issues.numbers])
    assert issues.count == pytest.approx(30, abs=12)


def test_the_default_scores_are_the_average_and_the_leave_one_out_loss(run):
    record, table, given, *_ = run
    issues = vlearn.label_issues(record)
    beside = issues.probabilities.copy()
    beside[np.arange(300), issues.given] = 0
    expected = record.column("loss").astype(float)[issues.numbers] * beside.max(1)
    np.testing.assert_allclose(issues.score, expected, rtol=1e-6)
    np.testing.assert_array_equal(issues.suggested, beside.argmax(1))
    by_loss = vlearn.label_issues(record, score="loss")
    np.testing.assert_array_equal(by_loss.score, record.column("loss")[by_loss.numbers])
    issues = vlearn.label_issues(table, given)
    np.testing.assert_array_equal(issues.score, table.loo_loss.double()[issues.numbers])
    np.testing.assert_allclose(
        issues.probabilities, (table.output + table.deviation).softmax(1)[issues.numbers], rtol=1e-5
    )
    by_margin = vlearn.label_issues(record, score="margin")
    np.testing.assert_array_equal(by_margin.score, -record.column("margin")[by_margin.numbers])


def test_a_run_that_fits_all_labels_says_nothing_of_how_many_are_wrong(tmp_path):
    counted = vlearn.label_issues(record_of(tmp_path / "a", [0.4] * 4, [0.9] * 4, [1, 1, 1, 0]))
    fits = vlearn.label_issues(record_of(tmp_path / "b", [0.4] * 4, [0.9] * 4, [1, 1, 1, 1]))
    assert counted.count is not None and fits.count is None and fits.joint is None
    assert fits.probabilities is not None and "is_issue" not in fits.columns()


def test_a_table_in_another_order_or_of_a_part_has_the_same_issues(run):
    from dataclasses import fields, replace

    _, table, given, *_ = run
    order = torch.randperm(300)[:200]
    rows = {
        field.name: getattr(table, field.name)[order]
        for field in fields(table)
        if getattr(table, field.name) is not None
    }
    part, whole = vlearn.label_issues(replace(table, **rows), given), vlearn.label_issues(table, given)
    kept = np.isin(whole.numbers, order)
    np.testing.assert_array_equal(part.numbers, whole.numbers[kept])
    np.testing.assert_array_equal(part.suggested, whole.suggested[kept])


def record_of(path, probability, last, agreement):
    """A record whose averages and last snapshot have these label probabilities."""
    count = len(probability)
    record = vlearn.TrainingRecord(count, path)
    first = 2 * np.array(probability) - np.array(last)
    for step, values in ((1, first), (2, np.array(last))):
        both = np.stack([values, 1 - values], 1)
        record.record(
            np.arange(count),
            step=step,
            label=np.zeros(count, int),
            loss=1 - values,
            probability=values,
            probabilities=both,
            agreement=np.array(agreement),
        )
        record.new_snapshot()
    return record


def test_groups_of_a_record_are_by_probability_then_and_now(tmp_path):
    record = record_of(tmp_path, [0.4, 0.3, 0.6, 0.9], [0.7, 0.2, 0.55, 0.95], [0.5, 0.0, 0.5, 1.0])
    issues = vlearn.label_issues(record)
    groups = dict(zip(issues.numbers.tolist(), issues.group.tolist(), strict=True))
    assert groups == {0: "memorised", 1: "unpredictable", 2: "uncertain", 3: "easy"}
    assert issues.counts == dict.fromkeys(["unpredictable", "uncertain", "memorised", "easy"], 1)


def test_groups_of_a_record_with_a_sweep_go_by_its_leverage(tmp_path):
    from types import SimpleNamespace

    record = record_of(tmp_path, [0.9, 0.9, 0.9, 0.3], [0.9, 0.9, 0.9, 0.3], [0.5, 1, 1, 0])
    record.record_sweep(2, SimpleNamespace(index=np.arange(4), leverage=np.array([0.1, 0.1, 5.0, 0.1])))
    issues = vlearn.label_issues(record)
    groups = dict(zip(issues.numbers.tolist(), issues.group.tolist(), strict=True))
    assert groups == {0: "easy", 1: "easy", 2: "uncertain", 3: "unpredictable"}


def test_groups_of_a_table_are_the_maps(run):
    _, table, given, *_ = run
    issues = vlearn.label_issues(table, given)
    p = table.output.softmax(1)[torch.arange(300), given].double().numpy()
    q = (table.output + table.deviation).softmax(1)[torch.arange(300), given].double().numpy()
    leverage = table.leverage.double().numpy()
    for number, group in zip(issues.numbers, issues.group, strict=True):
        expected = "easy" if p[number] >= 0.5 else "unpredictable"
        if leverage[number] > 2 * leverage.mean():
            expected = "uncertain"
        if p[number] >= 0.5 > q[number]:
            expected = "memorised"
        assert group == expected


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_single_logit_is_that_of_class_one(squeezed):
    torch.manual_seed(0)
    x = torch.randn(60, 4).double()
    true = (x[:, 0] > 0).long()
    given = true.clone()
    wrong = x[:, 0].abs().topk(3).indices
    given[wrong] = 1 - given[wrong]
    model = nn.Sequential(nn.Linear(4, 1), *([nn.Flatten(0)] if squeezed else [])).double()
    target = given.double() if squeezed else given.double().unsqueeze(1)
    loader, loss_fn = [(x, target)], F.binary_cross_entropy_with_logits
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    posterior = vlearn.posterior.fit(model, loader, loss_fn, "full", progress=False)
    table = vlearn.sweep(model, posterior, loader, loss_fn, progress=False)
    issues = vlearn.label_issues(table, given)
    assert sorted(issues.numbers[:3]) == sorted(wrong.tolist())
    assert (issues.suggested == 1 - issues.given).all()
    without = (table.output + table.deviation).reshape(-1).sigmoid()[torch.from_numpy(issues.numbers)]
    np.testing.assert_allclose(issues.probabilities[:, 1], without, rtol=1e-12)
    np.testing.assert_allclose(issues.probabilities.sum(1), 1)
    with pytest.raises(ValueError, match="labels hold class 2, but the model has 2 classes"):
        vlearn.label_issues(table, 2 * given)
    squares = vlearn.sweep(model, posterior, loader, F.mse_loss, progress=False)
    with pytest.raises(ValueError, match="or the logit of a binary cross-entropy"):
        vlearn.label_issues(squares, given)


def test_a_model_that_ends_in_softmax_has_the_issues_of_one_that_gives_logits():
    torch.manual_seed(0)
    x = torch.randn(40, 4).double()
    given = x[:, :3].argmax(1)
    wrong = torch.tensor([3, 8, 21])
    given[wrong] = (given[wrong] + 1) % 3
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)).double()
    with torch.no_grad():
        model[0].weight.copy_(4 * torch.eye(3, 4))
        model[0].bias.zero_()
    loader = [(x, given)]

    def loss_fn(p, y):
        return F.nll_loss(p.log(), y, reduction="none")

    posterior = vlearn.posterior.fit(model, loader, loss_fn, "full", prior_precision=10.0, progress=False)
    table = vlearn.sweep(model, posterior, loader, loss_fn, progress=False)
    issues = vlearn.label_issues(table, given, score="loss")
    numbers = torch.from_numpy(issues.numbers)
    without = (table.output + table.deviation).clamp(min=0)[numbers]
    np.testing.assert_allclose(issues.probabilities, without / without.sum(1, keepdim=True), rtol=1e-9, atol=1e-30)
    assert (issues.suggested == model(x).detach().scatter(1, given[:, None], -1).argmax(1)[numbers].numpy()).all()
    forgotten = vlearn.sensitivity.measures.memorization(model, posterior, loader, loss_fn)
    moved = (table.output + table.deviation).clamp(min=0)
    moved /= moved.sum(1, keepdim=True)
    torch.testing.assert_close(forgotten, (table.output - moved).gather(1, given[:, None]).squeeze(1))


def test_examples_that_were_not_seen_are_left_out(tmp_path):
    record = vlearn.TrainingRecord(5, tmp_path)
    record.record([0, 3], step=1, label=[1, 0], predicted=[0, 0], loss=[2.0, 1.0], probability=[0.2, 0.8])
    issues = vlearn.label_issues(record)
    assert issues.numbers.tolist() == [0, 3] and issues.suggested.tolist() == [0, 0]
    assert issues.count is None and issues.joint is None
    assert issues.given.tolist() == [1, 0]


def test_labels_in_another_order_than_those_that_were_seen_are_warned_of(run):
    record, _, given, *_ = run
    other = np.roll(np.asarray(given), 1)
    with pytest.warns(UserWarning, match=f"{np.count_nonzero(other != record.labels)} of the labels are others than"):
        vlearn.label_issues(record, other)
    vlearn.label_issues(record, np.asarray(given))  # in silence


def test_a_class_that_is_not_known_has_no_name(tmp_path):
    record = vlearn.TrainingRecord(2, tmp_path)
    record.record([0, 1], step=1, loss=[0.5, 1.0])
    columns = vlearn.label_issues(record, [0, 1]).columns(["cat", "dog"])
    assert columns["given"].tolist() == ["dog", "cat"] and columns["suggested"].tolist() == [None, None]


def test_issues_become_tables(run, tmp_path):
    pandas = pytest.importorskip("pandas")
    record, *_ = run
    issues = vlearn.label_issues(record)
    frame = issues.to_pandas(names=["cat", "dog", "horse"])
    assert list(frame.columns) == ["number", "given", "suggested", "score", "group", "is_issue"]
    assert frame["is_issue"].sum() == issues.count and frame["is_issue"][0]
    assert set(frame["given"]) == {"cat", "dog", "horse"}
    pytest.importorskip("pyarrow")
    issues.to_parquet(tmp_path / "issues.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "issues.parquet"), issues.to_pandas())


def test_cleanlab_takes_what_is_made_for_it(run):
    find = pytest.importorskip("cleanlab.filter").find_label_issues
    record, *_, wrong = run
    issues = vlearn.label_issues(record)
    found = issues.numbers[find(**issues.for_cleanlab(), n_jobs=1)]
    assert len(wrong & set(found.tolist())) > 0.7 * max(len(found), len(wrong))


BINARY = {
    "logits": nn.BCEWithLogitsLoss(),
    "weighed": nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
    "squares": nn.MSELoss(),
}


@pytest.mark.parametrize("name", BINARY)
def test_a_sweep_of_one_logit_is_of_two_classes(name):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    data = [(x, labels.float().unsqueeze(1))]
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    posterior = vlearn.IVON(model, lr=0.1, ess=60, hess_init=0.5).posterior()
    table = vlearn.sweep(model, posterior, data, BINARY[name], progress=False)
    if name == "squares":
        with pytest.raises(ValueError, match="the model has one output, but label issues need one for each class"):
            vlearn.label_issues(table, labels)
        return
    issues = vlearn.label_issues(table, labels)
    of_second = (table.output + table.deviation).sigmoid().squeeze(1).numpy()[issues.numbers]
    np.testing.assert_allclose(issues.probabilities[:, 1], of_second, rtol=1e-5)


class TestRefusals:
    def test_bad_arguments(self, run, tmp_path):
        from dataclasses import replace

        record, table, given, *_ = run
        with pytest.raises(ValueError, match="score='los', but a record has loss, margin"):
            vlearn.label_issues(record, score="los")
        with pytest.raises(ValueError, match="score='margin', but the table has loss, loo_loss"):
            vlearn.label_issues(table, given, score="margin")
        with pytest.raises(ValueError, match="labels is missing"):
            vlearn.label_issues(table)
        with pytest.raises(ValueError, match=r"labels have shape \(300, 2\)"):
            vlearn.label_issues(record, np.zeros((300, 2), int))
        with pytest.raises(ValueError, match="numbers reach 299, but labels has 100"):
            vlearn.label_issues(table, given[:100])
        with pytest.raises(ValueError, match="the table has no output"):
            vlearn.label_issues(replace(table, output=torch.full((300, 1), torch.nan)), given)
        with pytest.raises(TypeError, match="source is a MemoryMap"):
            vlearn.label_issues(record.memory)
        with pytest.raises(ValueError, match="labels hold class 7, but the model has 3 classes"):
            vlearn.label_issues(record, np.full(300, 7))
        with pytest.raises(ValueError, match="labels has 600, but the record has 300 examples"):
            vlearn.label_issues(record, np.tile(record.labels, 2))
        with pytest.raises(ValueError, match="names has 2 classes, but there is class 2"):
            vlearn.label_issues(record).columns(["cat", "dog"])

    def test_a_model_of_one_class(self, tmp_path):
        record = vlearn.TrainingRecord(2, tmp_path)
        record.record([0, 1], step=1, label=[0, 0], loss=[0.0, 0.0], probabilities=[[1.0], [1.0]])
        with pytest.raises(ValueError, match="the model has one output"):
            vlearn.label_issues(record)

    def test_a_record_without_labels(self, tmp_path):
        record = vlearn.TrainingRecord(3, tmp_path)
        record.record([0], step=1, loss=[1.0])
        with pytest.raises(ValueError, match="the record has seen no labels"):
            vlearn.label_issues(record)
        with pytest.raises(ValueError, match="probabilities of all classes were not kept"):
            vlearn.label_issues(record, [0, 0, 0]).for_cleanlab()
