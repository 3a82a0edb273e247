"""Run the slow tests of what a change touches, by imports.

    python tests/support/slow_of_change.py [BASE] [--distance N] [--list] [arguments of pytest]

The change is everything that differs from the last common commit with BASE (default: origin/main), new files
included. The slow tests of a file run if

- the file is changed, or imports a changed file, directly or through files of tests;
- a file in the folder that it tests is changed: jaxft/nn for tests/nn and its folders, scripts for
  tests/scripts;
- a string in it names a changed file of scripts/ or configs/: "dpo.py", "generate" or "generate --model ...".

Whole runs (tests/train/test_run.py, test_resume.py) run if a changed file is imported by the train loop,
directly or through others. --distance 2 counts files of jaxft that import a changed file as changed, and so
on. Without it, a test that reaches the change only through another file of jaxft isn't run.
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("jaxft", "scripts", "configs", "tests")
LOOP, OF_LOOP = "jaxft/train/loop.py", {"tests/train/test_run.py", "tests/train/test_resume.py"}
OF_ALL_TESTS = {"tests/conftest.py", "pyproject.toml", ".github/constraints.txt"}
NO_TESTS_FOUND = 5  # pytest's exit code


def module_name(file):
    """ "jaxft.nn.rope" for jaxft/nn/rope.py; scripts, recipes and tests import one another by their stems."""
    path = Path(file).with_suffix("")
    return ".".join(path.parts).removesuffix(".__init__") if path.parts[0] == "jaxft" else path.name


def imported_names(tree):
    """Every name that a module's syntax tree imports: `from a import b` is a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def imports_of(root):
    """{file: the files that it imports, or names in a string}, for each Python file below `root`."""
    files = [path.relative_to(root).as_posix() for top in FOLDERS for path in (root / top).rglob("*.py")]
    named = {Path(file).stem: file for file in files if file.startswith(("scripts/", "configs/"))}
    modules = {module_name(file): file for file in files}
    found = {}
    for file in files:
        tree = ast.parse((root / file).read_text())
        found[file] = {modules[name] for name in imported_names(tree) if name in modules}
        if file.startswith("tests/"):
            constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
            for text in [value for value in constants if isinstance(value, str)]:
                found[file] |= {
                    path for stem, path in named.items() if text.split(" ")[0] == stem or f"{stem}.py" in text
                }
    return found


def folder_of(file):
    """The folder of a file's tests: tests/nn for jaxft/nn/rope.py, tests/scripts for scripts/plan.py."""
    parts = Path(file).parts
    return "/".join(("tests", *parts[1:2])) if parts[0] == "jaxft" else f"tests/{parts[0]}"


def closure(imports, files):
    """The files and all that they import, also through others."""
    while more := {inner for file in files for inner in imports.get(file, ())} - files:
        files = files | more
    return files


def touched(imports, changed, distance=1):
    """The files of tests that the changed files touch; imports: of `imports_of`."""
    tests = {file for file in imports if file.startswith("tests/")}
    test_files = {file for file in tests if Path(file).name.startswith("test_")}
    if changed & OF_ALL_TESTS:
        return test_files
    for _ in range(distance - 1):
        changed = changed | {file for file in imports if imports[file] & changed}
    folders = {folder_of(file) for file in changed}
    reached = changed | {file for file in test_files if folders & {*map(str, Path(file).parents)}}
    if changed & closure(imports, {LOOP}):
        reached |= OF_LOOP & test_files
    while more := {file for file in tests - reached if imports[file] & reached}:
        reached = reached | more
    return reached & test_files


def changed_files(root, base):
    """Every file that differs from the last common commit with `base`, deleted and new ones included."""

    def lines_of(*command):
        done = subprocess.run(["git", *command], cwd=root, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()

    (start,) = lines_of("merge-base", base, "HEAD")
    return {*lines_of("diff", "--name-only", start), *lines_of("ls-files", "--others", "--exclude-standard")}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", nargs="?", default="origin/main", metavar="BASE")
    parser.add_argument("--distance", type=int, default=1, metavar="N")
    parser.add_argument("--list", action="store_true", help="print the files of tests, run nothing")
    args, others = parser.parse_known_args()
    files = sorted(touched(imports_of(ROOT), changed_files(ROOT, args.base), args.distance))
    print(*files, sep="\n", flush=True)
    if args.list or not files:
        return 0
    code = subprocess.call([sys.executable, "-m", "pytest", "-m", "slow", *others, *files], cwd=ROOT)
    return 0 if code == NO_TESTS_FOUND else code


if __name__ == "__main__":
    raise SystemExit(main())
