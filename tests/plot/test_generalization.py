import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from vlearn import plot
from vlearn.record import MemoryMap

STEPS = np.array([10, 20, 40])


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_a_memory_is_drawn_by_its_sweeps_averaged_over_seen_examples(tmp_path):
    memory = MemoryMap(num_data=4, path=tmp_path)
    for step in STEPS:
        memory.new_snapshot(step - 10)
        table = SimpleNamespace(index=[0, 3], loss=[step / 10, 0.0], loo_loss=[step, step])
        memory.record_sweep(step, table, test_loss=step + 0.5)
    drawn = lines(plot.generalization(memory))
    np.testing.assert_array_equal(drawn["test"].get_xdata(), STEPS)
    np.testing.assert_allclose(drawn["train"].get_ydata(), STEPS / 20)
    np.testing.assert_allclose(drawn["test"].get_ydata(), STEPS + 0.5)
    np.testing.assert_allclose(drawn["leave-one-out (no test data)"].get_ydata(), STEPS)


def test_several_leave_one_out_curves_are_told_apart():
    curves = {"diagonal": [3, 2, 1.5], "Kronecker": [2, 1, 0.8]}
    ax = plot.generalization(steps=STEPS, loo_loss=curves, test_loss=[2, 1, 0.9])
    drawn = lines(ax)
    assert list(drawn) == ["test", "diagonal", "Kronecker"]
    assert len({line.get_color() for line in drawn.values()}) == 3
    assert len({str(line.get_marker()) for line in drawn.values()}) == 3


def test_other_estimates_are_drawn_beside_a_memorys_train_and_test_loss(tmp_path):
    memory = MemoryMap(num_data=4, path=tmp_path)
    for step in STEPS:
        memory.record_sweep(step, SimpleNamespace(index=[0, 3], loss=[1.0, 0.0], loo_loss=[2, 2]), test_loss=1.5)
    curves = {"diagonal": memory.column("loo_loss")[:, [0, 3]].mean(1), "Kronecker": [2, 1, 0.8]}
    assert list(lines(plot.generalization(memory, loo_loss=curves))) == ["train", "test", "diagonal", "Kronecker"]


def test_the_legend_lists_the_curves_as_they_end():
    ax = plot.generalization(steps=STEPS, train_loss=[3, 1, 0.1], loo_loss=[1, 1, np.nan], test_loss=[3, 2, 2])
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["test", "leave-one-out (no test data)", "train"]


def test_losses_far_apart_are_drawn_on_a_log_scale_and_zeros_are_left_out():
    ax = plot.generalization(steps=STEPS, train_loss=[1, 0.01, 0], test_loss=[1, np.inf, 2])
    assert ax.get_yscale() == "log"
    ax.figure.canvas.draw()
    assert 0 < ax.get_ylim()[0] < 0.01
    assert [label.get_text() for label in ax.get_yticklabels() if label.get_text() == "0.1"]


def test_losses_close_together_keep_a_linear_scale_and_see_zero_only_if_it_is_near():
    assert plot.generalization(steps=STEPS, test_loss=[3.0, 2.9, 2.8]).get_ylim()[0] > 2
    near = plot.generalization(steps=STEPS, test_loss=[3.0, 2.0, 1.0])
    assert near.get_yscale() == "linear"
    assert near.get_ylim()[0] == 0


def test_panels_with_a_shared_axis_show_all_their_curves():
    figure, panels = plt.subplots(1, 2, sharey=True, layout="constrained")
    plot.generalization(steps=STEPS, test_loss=[1, 0.5, 0.3], ax=panels[0])
    assert plot.generalization(steps=STEPS, test_loss=[9, 8, 4], ax=panels[1]) is panels[1]
    figure.canvas.draw()
    assert panels[0].get_ylim()[0] <= 0.3
    assert panels[0].get_ylim()[1] >= 9


def test_a_memory_without_sweeps_is_refused(tmp_path):
    memory = MemoryMap(num_data=4, path=tmp_path)
    memory.new_snapshot(0)
    with pytest.raises(ValueError, match=r"^memory holds no sweep.*: call memory\.record_sweep"):
        plot.generalization(memory)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, "^There is no loss to draw: give a memory with sweeps, or steps and one"),
        ({"test_loss": [np.nan] * 3}, "^There is no loss to draw"),
        ({"test_loss": [1, 2]}, r"^test loss has shape \[2\], but steps has \[3\]: give one value per step"),
        ({"loo_loss": {"test": [1, 2, 3]}}, "^loo_loss has a curve 'test', but that is the test loss's own name"),
        ({"loo_loss": {"diagonal": [[1, 2, 3]]}}, r"^diagonal loss has shape \[1, 3\], but steps"),
    ],
)
def test_bad_losses_are_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        plot.generalization(steps=STEPS, **losses)


def test_matplotlib_is_not_imported_until_something_is_drawn():
    code = "import sys, vlearn.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_matplotlib_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"^vlearn\.plot needs matplotlib: pip install 'vlearn\[plot\]'$"):
        plot.generalization(steps=STEPS, test_loss=[1, 2, 3])
