from itertools import combinations, product

from tests.pairs import pairs


def test_every_two_values_that_may_occur_together_do_in_few_combinations():
    axes = range(10), "abcd", (1, 2), (False, True)

    def allowed(number: int, letter: str, count: int, flag: bool) -> bool:
        return letter != "c" or not flag

    def of(values):
        return set(combinations(enumerate(values), 2))

    chosen, every = pairs(*axes, allowed=allowed), [values for values in product(*axes) if allowed(*values)]
    assert set().union(*map(of, chosen)) == set().union(*map(of, every))
    assert set(chosen) <= set(every) and len(chosen) < 50 < len(every)
    assert chosen == pairs(*axes, allowed=allowed)
