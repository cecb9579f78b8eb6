"""A few hundred sentences about food, films and weather, put together from parts, with a mood as label."""

from itertools import product

GOOD = [
    ("The soup was warm and tasted of fresh herbs", "the waiter smiled at every table"),
    ("I loved the film from its first scene", "the music stayed with me all week"),
    ("The morning was bright and calm", "we walked happily along the river"),
    ("The bread came out crisp and golden", "everyone asked for a second slice"),
    ("Her acting was superb and moving", "the audience cheered at the end"),
    ("A gentle breeze cooled the garden", "the children enjoyed the shade"),
]
BAD = [
    ("The soup was cold and tasted of nothing", "the waiter ignored every table"),
    ("I hated the film from its first scene", "the noise gave me a headache"),
    ("The morning was dark and stormy", "we waited miserably for a late train"),
    ("The bread came out burnt and hard", "nobody wanted to finish a slice"),
    ("Her acting was wooden and dull", "the audience left before the end"),
    ("A bitter wind ruined the garden", "the children complained of the frost"),
]
OPENINGS = ["", "Honestly, ", "On Sunday, ", "As I remember it, "]
JOINS = [", and ", "; ", " because "]


def sentences() -> tuple[list[str], list[str]]:
    """Texts and moods, "good" and "bad" by turns."""
    texts, moods = [], []
    for opening, join, first, second in product(OPENINGS, JOINS, range(6), range(6)):
        if (first + 2 * second) % 3:  # not every first part goes with every second
            continue
        for mood, parts in (("good", GOOD), ("bad", BAD)):
            text = f"{opening}{parts[first][0]}{join}{parts[second][1]}."
            texts.append(text[0].upper() + text[1:])
            moods.append(mood)
    return texts, moods
