from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlearn import plot
from vlearn.record import MemoryMap

N = 200
RNG = np.random.default_rng(0)
LEVERAGE = RNG.lognormal(-4, 2, N)
ERROR = RNG.uniform(0, 1, N)
INFLUENCE = LEVERAGE * ERROR**2
MOST = np.argsort(-INFLUENCE)
ARRAYS = {"leverage": LEVERAGE, "prediction_error": ERROR, "self_influence": INFLUENCE}


def texts(ax):
    return [text.get_text() for text in ax.texts]


def pictures(ax):
    return [child for child in ax.child_axes if child.images]


def test_every_example_is_a_point_and_the_most_sensitive_are_circled():
    ax = plot.memory_map(**ARRAYS, top=5)
    points, circles = ax.collections
    np.testing.assert_allclose(points.get_offsets(), np.stack([LEVERAGE, ERROR], 1))
    np.testing.assert_allclose(circles.get_offsets(), np.stack([LEVERAGE, ERROR], 1)[MOST[:5]])
    assert texts(ax) == ["unpredictable", "uncertain", "predictable", "1", "2", "3", "4", "5"]
    assert ax.get_xlabel().startswith("leverage")
    assert ax.get_ylabel().startswith("prediction error")


def test_without_self_influence_nothing_is_circled():
    ax = plot.memory_map(leverage=LEVERAGE, prediction_error=ERROR)
    assert len(ax.collections[1].get_offsets()) == 0


@pytest.mark.parametrize("shape", [(N, 8, 8), (N, 1, 8, 8), (N, 3, 8, 8), (N, 8, 8, 3)], ids=str)
def test_the_circled_examples_stand_beside_the_map_with_index_and_label(shape):
    images = RNG.normal(size=shape)
    ax = plot.memory_map(**ARRAYS, images=images, labels=np.arange(N) % 10, top=6)
    assert len(pictures(ax)) == 6
    assert pictures(ax)[0].get_xlabel() == f"#{MOST[0]}\nlabel {MOST[0] % 10}"
    expected = plot.thumbnails(images, MOST[:6])
    for small, picture in zip(pictures(ax), expected, strict=True):
        np.testing.assert_array_equal(small.images[0].get_array(), picture)
    ax.figure.canvas.draw()
    right = max(small.get_tightbbox().x1 for small in pictures(ax))
    assert right <= ax.figure.bbox.x1


def test_labels_may_be_names():
    names = [f"name {i}" for i in range(N)]
    ax = plot.memory_map(**ARRAYS, images=np.zeros((N, 2, 2)), labels=names)
    assert pictures(ax)[1].get_xlabel() == f"#{MOST[1]}\nname {MOST[1]}"


def test_labels_of_pandas_go_by_their_place():
    pandas = pytest.importorskip("pandas")
    names = pandas.Series([f"name {i}" for i in range(N)], index=range(N)[::-1])
    ax = plot.memory_map(**ARRAYS, images=np.zeros((N, 2, 2)), labels=names)
    assert pictures(ax)[1].get_xlabel() == f"#{MOST[1]}\nname {MOST[1]}"


def test_tensors_are_drawn_like_arrays():
    tensors = {name: torch.from_numpy(values).requires_grad_() for name, values in ARRAYS.items()}
    ax = plot.memory_map(**tensors, images=torch.rand(N, 1, 4, 4), labels=torch.arange(N))
    np.testing.assert_allclose(ax.collections[0].get_offsets(), np.stack([LEVERAGE, ERROR], 1))
    assert pictures(ax)[0].get_xlabel() == f"#{MOST[0]}\nlabel {MOST[0]}"


def test_zeros_stand_at_the_left_end_and_non_finite_examples_are_left_out():
    leverage = np.array([0.0, 1e-30, 0.1, 1.0, np.nan, 2.0])
    ax = plot.memory_map(leverage=leverage, prediction_error=[0.1] * 5 + [np.inf], self_influence=[1.0] * 6)
    np.testing.assert_allclose(ax.collections[0].get_offsets()[:, 0], [1e-5, 1e-5, 0.1, 1.0])
    assert len(ax.collections[1].get_offsets()) == 4
    ax.figure.canvas.draw()


def test_a_map_of_zeros_is_drawn():
    plot.memory_map(leverage=np.zeros(3), prediction_error=np.zeros(3)).figure.canvas.draw()


def test_a_memory_shows_its_last_sweep_with_leverage_or_the_one_named(tmp_path):
    memory = MemoryMap(num_data=3, path=tmp_path)
    for step in (1, 2):
        leverage = np.array([0.1, 0.2, 0.4]) * step
        table = SimpleNamespace(index=[0, 1, 2], leverage=leverage, prediction_error=leverage, self_influence=leverage)
        memory.record_sweep(step, table)
    memory.new_snapshot(2)
    last = plot.memory_map(memory).collections[0].get_offsets()
    np.testing.assert_allclose(last[:, 0], [0.2, 0.4, 0.8], rtol=1e-6)
    first = plot.memory_map(memory, 0).collections[0].get_offsets()
    np.testing.assert_allclose(first[:, 0], [0.1, 0.2, 0.4], rtol=1e-6)


def test_a_memory_without_leverage_is_refused(tmp_path):
    memory = MemoryMap(num_data=3, path=tmp_path)
    memory.new_snapshot(0)
    with pytest.raises(ValueError, match="^memory holds no leverage: record a sweep made with leverage='probe'"):
        plot.memory_map(memory)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"leverage": None}, "^leverage or prediction_error is missing: give a memory, or both"),
        ({"prediction_error": ERROR[:-1]}, "^prediction_error has 199 rows, but leverage has 200"),
        ({"labels": [0, 1]}, "^labels has 2 rows, but leverage has 200: give one per example"),
        ({"images": np.zeros((N, 64))}, r"^images has shape \[200, 64\], but it must be \[N, H, W\]"),
        ({"images": np.zeros((N, 4, 4, 4))}, r"^images has shape \[200, 4, 4, 4\]"),
        ({"leverage": np.full(N, np.nan)}, "^No example has both leverage and prediction error"),
    ],
)
def test_bad_arrays_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        plot.memory_map(**(ARRAYS | changed))


@pytest.mark.parametrize("size", [20, 5000])
def test_the_numbers_of_crowded_points_do_not_cover_each_other(size):
    leverage = 0.1 * np.exp(0.02 * RNG.normal(size=size))
    error = 0.5 + 0.02 * RNG.normal(size=size)
    ax = plot.memory_map(leverage=leverage, prediction_error=error, self_influence=leverage, top=4)
    ax.figure.canvas.draw()
    numbers = [text.get_window_extent() for text in ax.texts if text.get_text().isdigit()]
    assert len(numbers) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(numbers) for b in numbers[:i])


def test_thumbnails_keep_unit_images_scale_bytes_and_stretch_others():
    unit = RNG.uniform(size=(3, 2, 2)).astype(np.float32)
    np.testing.assert_array_equal(plot.thumbnails(unit, [2, 0]), unit[[2, 0]])
    np.testing.assert_allclose(plot.thumbnails((255 * unit).astype(np.uint8), [1])[0], unit[1], atol=1 / 255)
    stretched = plot.thumbnails(10 * unit - 5, [1])[0]
    assert (stretched.min(), stretched.max()) == (0, 1)
    np.testing.assert_array_equal(plot.thumbnails(np.full((1, 2, 2), -3.0), [0]), np.zeros((1, 2, 2)))
    assert np.isfinite(plot.thumbnails(np.full((1, 2, 2), np.nan), [0])).all()
    assert len(plot.thumbnails(unit, [])) == 0
