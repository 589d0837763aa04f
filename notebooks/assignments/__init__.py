"""Homework for the five chapters: source notebooks, release.py, and grading by pytest.  README.md is for lecturers."""
