"""Results show the shapes of their columns, and a table becomes a data frame."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.sensitivity.small import LABELS, N, inputs, loss_of, network, optimizer_of

LOADER = [(inputs(), LABELS, torch.arange(N).flip(0))]


@pytest.fixture
def trained():
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    optimizer.step()
    return model, optimizer


def test_results_show_shapes_and_not_values(trained):
    model, optimizer = trained
    given = model, optimizer.posterior(), LOADER
    table = vlearn.sweep(*given, F.cross_entropy, leverage=None)
    assert repr(table) == (
        "SensitivityTable(index=[6], loss=[6], loo_loss=[6], deviation=[6, 3], self_influence=[6], "
        "prediction_error=[6], deviation_norm=[6], output=[6, 3])"
    )
    influence = vlearn.influence(*given, LOADER, F.cross_entropy)
    assert repr(influence) == "Influence(values=[6, 6], train_index=[6], test_index=[6])"
    groups = vlearn.leave_group_out(*given, {"first": [0, 1], "last": [5]}, F.cross_entropy)
    assert repr(groups) == (
        "GroupTable(group=['first', 'last'], size=[2], loss=[2], left_out_loss=[2], index=list of 2, "
        "deviation=list of 2)"
    )
    assert repr(optimizer.sensitivities()) == (
        "Sensitivities(residual=[6, 3], self_influence=[6], prediction_error=[6], step=1)"
    )
    assert repr(vlearn.label_issues(table, LABELS)).startswith("LabelIssues(numbers=[6], given=[6], ")


def test_a_table_becomes_a_data_frame(trained, tmp_path):
    pandas = pytest.importorskip("pandas")
    model, optimizer = trained
    table = vlearn.sweep(model, optimizer.posterior(), LOADER, F.cross_entropy, refined=True)
    frame = table.to_pandas()
    assert list(frame.columns) == [
        *("index", "loss", "loo_loss", "self_influence", "leverage", "prediction_error", "used_first_order"),
        *("deviation_norm", "largest_eigenvalue"),
    ]
    for name in frame.columns:
        np.testing.assert_array_equal(frame[name], getattr(table, name).numpy())
    scalars = vlearn.sweep(model, optimizer.posterior(), LOADER, F.cross_entropy, leverage=None, loo_loss=False)
    assert list(scalars.columns()) == ["index", "loss", "self_influence", "prediction_error", "deviation_norm"]
    pytest.importorskip("pyarrow")
    table.to_parquet(tmp_path / "table.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "table.parquet"), frame)
