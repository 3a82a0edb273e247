"""The mark `quick_cases(*patterns)`: which cases of a parametrised test run by default."""

import fnmatch

import pytest


def mark_others_slow(found, error):
    """Mark cases of a parametrised test as slow, but for those that a pattern of its mark quick_cases names.

    found: what pytest makes of one function, a list with one item for each case.
    A pattern is the id of a case, or a glob pattern of ids. Raises `error` if the mark would not do what it
    says: a pattern that names no case, no pattern at all, a quick case that is marked as slow, a test without
    parameters.
    """
    mark = found[0].get_closest_marker("quick_cases") if found else None
    if mark is None:
        return
    cases = {case.callspec.id: case for case in found if hasattr(case, "callspec")}
    named = [
        {name for name in cases if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        for pattern in mark.args
    ]
    quick = set().union(*named)
    slow = [name for name in quick if cases[name].get_closest_marker("slow")]
    if not all(named) or not quick or slow:
        raise error(
            f"quick_cases{mark.args} of {found[0].originalname}: each must name a case that is not marked as "
            f"slow; the cases are {', '.join(map(repr, cases)) or 'none'}"
        )
    for name in cases.keys() - quick:
        cases[name].add_marker(pytest.mark.slow)
