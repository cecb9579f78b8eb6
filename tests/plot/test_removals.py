import numpy as np
import pytest

from vlearn.plot import removals


class Check:
    predicted, retrained = np.array([0.1, 0.2, 0.4]), np.array([0.05, 0.1, 0.2])


def test_each_removal_is_a_point_beside_the_two_lines():
    ax = removals(Check())
    points = ax.collections[0].get_offsets()
    np.testing.assert_allclose(points, np.stack([Check.predicted, Check.retrained], 1))
    identity, fitted = ax.get_lines()
    np.testing.assert_allclose(identity.get_xdata(), identity.get_ydata())
    np.testing.assert_allclose(fitted.get_ydata(), 0.5 * fitted.get_xdata())
    assert fitted.get_label() == "slope 0.50"
    assert removals(predicted=[1.0, 2.0], retrained=[1.0, 2.0], ax=ax) is ax


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match="predicted or retrained is missing"):
        removals(predicted=[1.0])
    with pytest.raises(ValueError, match="give one of each"):
        removals(predicted=[1.0], retrained=[1.0, 2.0])
