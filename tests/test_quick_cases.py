"""The mark quick_cases: cases that it doesn't name are slow, and what names no case is an error."""

from types import SimpleNamespace

import pytest
from quick_cases import mark_others_slow


class Case:
    """A collected test with these marks: {name: arguments}."""

    originalname = "test_law"

    def __init__(self, name, **marks):
        self.callspec = SimpleNamespace(id=name)
        self.marks = {key: SimpleNamespace(args=args) for key, args in marks.items()}

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.marks[mark.name] = mark


def slow_of(patterns, names=("llama", "gemma2", "gemma3", "3-[4, 12]"), **marks):
    cases = [Case(name, quick_cases=patterns, **marks) for name in names]
    mark_others_slow(cases, ValueError)
    return [case.callspec.id for case in cases if case.get_closest_marker("slow")]


def test_cases_that_no_pattern_names_are_slow():
    assert slow_of(("llama", "gemma*")) == ["3-[4, 12]"]
    assert slow_of(("3-[4, 12]",)) == ["llama", "gemma2", "gemma3"]


def test_a_test_without_the_mark_stays_as_it_is():
    case = Case("llama")
    mark_others_slow([case], ValueError)
    mark_others_slow([], ValueError)
    assert not case.marks


@pytest.mark.parametrize(
    "patterns, marks", [(("lama",), {}), (("llama", "qwen*"), {}), ((), {}), (("llama",), {"slow": ()})]
)
def test_a_mark_that_would_not_do_what_it_says_is_an_error(patterns, marks):
    with pytest.raises(ValueError, match=r"of test_law: each must name a case .* 'gemma2'"):
        slow_of(patterns, **marks)
