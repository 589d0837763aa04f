"""One test an exercise; the grading itself was done by conftest.py."""
import pytest


def test_exercise(exercise):
    """Passes with full points.  What was wrong stands in the summary below."""
    if exercise["score"] < exercise["points"]:
        pytest.fail(exercise["message"].splitlines()[0], pytrace=False)
