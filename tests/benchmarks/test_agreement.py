import numpy as np
import pytest

from benchmarks.report.agreement import agreement, spearman, with_intervals


def test_agreement_is_numpys_correlation_and_the_least_squares_slope():
    generator = np.random.default_rng(0)
    x = generator.normal(size=30)
    y = 0.5 * x + generator.normal(size=30)
    correlation, slope = agreement(x, y)
    assert correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert slope == pytest.approx(np.polyfit(x, y, 1)[0])


def test_spearman_sees_ranks_alone_and_ties_share_theirs():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    tied = np.array([1.0, 1.0, 2.0, 5.0])
    assert spearman(x, tied) == pytest.approx(np.corrcoef([0, 1, 2, 3], [0.5, 0.5, 2, 3])[0, 1])


@pytest.mark.parametrize("decimals", [1, 8])
def test_intervals_are_those_of_resampled_rows(decimals):
    """The same resamples, row by row, with and without ties."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=40).round(decimals)
    y = (x + generator.normal(size=40)).round(decimals)
    found = with_intervals(x, y, seed=3)
    drawn = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), 2000)
    rows = [np.repeat(np.arange(40), counts) for counts in drawn]
    expected = {
        "pearson": [agreement(x[each], y[each])[0] for each in rows],
        "slope": [agreement(x[each], y[each])[1] for each in rows],
        "spearman": [spearman(x[each], y[each]) for each in rows],
    }
    whole = {"pearson": agreement(x, y)[0], "slope": agreement(x, y)[1], "spearman": spearman(x, y)}
    for name, values in expected.items():
        assert found[name] == pytest.approx([whole[name], *np.quantile(values, (0.025, 0.975))])
