"""Studies on a tiny model: declared, halved, killed and continued; what a declaration refuses."""

from contextlib import chdir

import pytest
from dpo_place import write_pair_place
from prepared import working_directory

from jaxft.lab import halving, ledger
from jaxft.lab.study import load_study
from jaxft.runs.settings.config import load_config

FILE = '''"""A study of two losses."""

from jaxft.lab.study import LogRange, SearchedLoss, Study
from jaxft.objectives.losses.preference_losses import dpo, ipo
from jaxft.runs.settings.config import load_config


def study() -> Study:
    return Study(
        name="tiny",
        recipe=load_config("config.py", ["steps=9", "held_out=0.5", "micro=2"]),
        losses={
            "dpo": SearchedLoss(dpo, {"beta": LogRange(0.03, 0.3)}),
            "ipo": SearchedLoss(ipo, {"beta": (0.05, 0.1)}),
        },
        lr=LogRange(1e-3, 2e-2),
        trials=3,
        seeds=(0, 1),
    )
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_pair_place(folder)
    (folder / "study.py").write_text(FILE)
    return folder


@pytest.fixture
def recipe(place):
    with chdir(place):
        return load_config("config.py", ["steps=9", "held_out=0.5"])


def run(place, text=FILE, name="study.py"):
    (place / name).write_text(text)
    with working_directory(place):
        return halving.run_study(*load_study(name))


@pytest.mark.slow
def test_a_study_of_two_losses_is_continued_bit_for_bit(place, monkeypatch):
    assert run(place) == 0
    entries = ledger.read_chain(place / "runs/tiny/study.jsonl")
    assert [e["seed"] for e in entries if "wave" in e] == [0, 0, 0, 0, 1]
    assert run(place) == 0
