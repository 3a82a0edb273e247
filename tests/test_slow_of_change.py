"""Which files of tests a change touches, in a made-up tree."""

import subprocess

import pytest
from slow_of_change import changed_files, imports_of, touched

NN = "nn/attention/test_attention nn/test_param"
RUNS = "train/test_resume train/test_run"
TREE = {
    "jaxft/__init__.py": "",
    "jaxft/nn/__init__.py": "",
    "jaxft/nn/rope.py": "",
    "jaxft/nn/layers.py": "from jaxft.nn import rope",
    "jaxft/train/step.py": "from jaxft.nn.layers import norm",
    "jaxft/train/loop.py": "from jaxft.train import step",
    "scripts/plan.py": "import jaxft.train.step",
    "configs/dpo.py": "",
    "tests/support/tiny.py": "from jaxft.nn.rope import turn",
    "tests/support/tiny_run.py": "import tiny",
    "tests/nn/test_param.py": "",
    "tests/nn/attention/test_attention.py": "",
    "tests/train/test_run.py": "import tiny_run",
    "tests/train/test_resume.py": "",
    "tests/train/test_step.py": "from jaxft.train.step import step",
    "jaxft/plan/hlo.py": "",
    "tests/plan/test_layers.py": "def test(): from jaxft.nn import layers",
    "tests/plan/test_table.py": "COMMANDS = ['plan --devices h100:1']",
    "tests/runs/test_configs.py": "FILE = 'configs/dpo.py'",
    "tests/runs/test_log.py": "TEXT = 'a plan of dpo'",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "changed, distance, expected",
    [
        # its folder; through two files of support; whole runs, since the loop imports it
        ("jaxft/nn/rope.py", 1, f"{NN} {RUNS}"),
        ("jaxft/nn/rope.py", 2, f"{NN} plan/test_layers {RUNS}"),
        ("jaxft/nn/rope.py", 3, f"{NN} plan/test_layers {RUNS} train/test_step"),
        ("jaxft/nn/layers.py", 1, f"{NN} plan/test_layers {RUNS}"),
        ("jaxft/nn/gone.py", 1, NN),
        ("jaxft/plan/hlo.py", 1, "plan/test_layers plan/test_table"),
        ("jaxft/train/step.py", 1, f"{RUNS} train/test_step"),
        ("tests/support/tiny.py", 1, "train/test_run"),
        ("tests/runs/test_log.py", 1, "runs/test_log"),
        ("scripts/plan.py", 1, "plan/test_table"),
        ("configs/dpo.py", 1, "runs/test_configs"),
        ("README.md", 1, ""),
        ("pyproject.toml", 1, " ".join(sorted(n[6:-3] for n in TREE if "/test_" in n))),
    ],
)
def test_a_change_touches_the_tests_that_import_it_and_those_of_its_folder(tree, changed, distance, expected):
    found = touched(imports_of(tree), {changed}, distance)
    assert sorted(found) == [f"tests/{name}.py" for name in expected.split()]


def test_changed_files_are_those_since_the_common_commit_new_and_deleted_ones_included(tree):
    def git(*command):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *command], cwd=tree, check=True, capture_output=True)

    git("init", "-b", "main")
    git("add", ".")
    git("commit", "-m", "start")
    git("checkout", "-b", "mine")
    (tree / "scripts/plan.py").write_text("import jaxft")
    git("commit", "-am", "mine")
    git("checkout", "main")
    (tree / "configs/dpo.py").write_text("import jaxft")
    git("commit", "-am", "of others")
    git("checkout", "mine")
    (tree / "jaxft/nn/rope.py").unlink()
    (tree / "jaxft/nn/new.py").write_text("")
    assert changed_files(tree, "main") == {"scripts/plan.py", "jaxft/nn/rope.py", "jaxft/nn/new.py"}
