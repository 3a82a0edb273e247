"""Laws of the source tree: layout, import direction, no optional members, one meaning per name."""

import ast
import functools
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Bottom to top. A folder imports itself and the layers above it in this list; folders of one layer never
# import one another.
LAYERS = (
    {"annotations"},
    {"distributed"},
    {"nn"},
    {"batch"},
    {"models", "objectives", "data"},
    {"engine", "optim", "weights"},
    {"runs"},
    {"report", "rl"},
    {"train"},
    {"lab", "serve", "plan"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

MODULES = sorted(p for p in (ROOT / "jaxft").rglob("*.py") if p != ROOT / "jaxft" / "__init__.py")
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
PACKAGES = sorted(p.parent for p in (ROOT / "jaxft").rglob("__init__.py") if p.parent != ROOT / "jaxft")
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))

# Members of types from Python, jax and ctypes that only some versions or platforms have; none of jaxft's own
# is optional.
FOREIGN = {
    "__name__",
    "coords",  # TPU devices
    "core_on_chip",  # TPU devices
    "eqns",  # jaxprs
    "errno",
    "jaxpr",  # closed jaxprs
    "key",  # keys of tree paths
    "malloc_trim",  # glibc
    "slice_index",  # TPU slices and hosts of GPUs
    "unregister_event_listener",  # jax.monitoring
}
# Public names that several modules define for the same meaning, with the reason.
SHARED_NAMES = {
    "Outputs": "the outputs of an objective's forward pass, one type per objective",
    "TOO_LONG": "the choices of data.too_long",
    "UNUSED": "the fields of a batch that an objective's loss does not read",
    "VERSION": "the version of what a file stores in a cache",
    "WEIGHTING": "the choices of data.weighting",
}


@functools.cache
def parsed(file):
    return ast.parse(file.read_text())


def name_of(file):
    return file.relative_to(ROOT).as_posix()


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_of(file):
    """`nn` for jaxft/nn/layers.py, `batch` for jaxft/batch.py."""
    return file.relative_to(ROOT / "jaxft").with_suffix("").parts[0]


@functools.cache
def imports(file):
    """Every module or name that a file imports, anywhere in it, as dotted text: `from a import b` is a.b, and
    so is import_module("a.b").
    """
    found = []
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: use absolute imports"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return tuple(found)


@functools.cache
def attributes(file):
    """Every dotted chain of names in a file, such as "jax.sharding.Mesh"."""
    return {ast.unparse(n) for n in ast.walk(parsed(file)) if isinstance(n, ast.Attribute | ast.Name)}


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


@functools.cache
def module_names():
    return {module_of(file) for file in MODULES}


def own_imports(file):
    """Modules of jaxft that a file imports."""
    known = module_names()
    for name in imports(file):
        if within(name, "jaxft") and name != "jaxft.__version__":
            yield name if name in known else name.rpartition(".")[0]


def import_cycles(graph):
    """Strongly connected groups of more than one module (Tarjan 1972)."""
    index, low, stack, cycles = {}, {}, [], []

    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in graph.get(v, ()):
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            group = [stack.pop()]
            while group[-1] != v:
                group.append(stack.pop())
            if len(group) > 1:
                cycles.append(sorted(group))

    for v in sorted(graph):
        if v not in index:
            visit(v)
    return cycles


def test_the_top_of_the_package_has_one_entry_per_layer_name():
    entries = {
        p.stem
        for p in (ROOT / "jaxft").iterdir()
        if p.name not in ("__init__.py", "__main__.py", "README.md", "__pycache__")
    }
    assert entries == LEVEL.keys() and len(entries) <= 18


def test_imports_follow_the_layers():
    wrong = []
    for file in MODULES:
        mine = folder_of(file)
        if mine == "__main__":
            continue
        for name in own_imports(file):
            other = name.split(".")[1]
            if other != mine and LEVEL[other] >= LEVEL[mine]:
                wrong.append(f"{name_of(file)} imports {name}")
    assert not wrong


def is_read(name):
    return isinstance(name.ctx, ast.Load)


def test_a_name_is_imported_from_the_module_that_defines_it():
    """A module passes on no name that it only imports; `import jaxft` (jaxft/__init__.py) is the one door."""
    imported = {}  # module -> names that it only imports from another module of jaxft
    for file in MODULES:
        body = parsed(file).body
        names = {a.asname or a.name for n in body if isinstance(n, ast.ImportFrom) for a in n.names}
        stored = {n.id for n in ast.walk(parsed(file)) if isinstance(n, ast.Name) and not is_read(n)}
        imported[module_of(file)] = names - stored
    passed_on = [
        f"{name_of(file)} imports {name}"
        for file in [*MODULES, *SCRIPTS, *CONFIGS]
        for name in imports(file)
        if name not in module_names() and name.rpartition(".")[2] in imported.get(name.rpartition(".")[0], ())
    ]
    assert not passed_on


def test_there_is_no_import_cycle():
    assert not import_cycles({module_of(file): {*own_imports(file)} - {module_of(file)} for file in MODULES})


def test_two_files_of_tests_have_not_one_name():
    names = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}  # pytest imports them by name


def test_the_cycle_finder_finds_a_cycle():
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_import_is_hidden_from_the_import_graph():
    wrong = []
    for file in MODULES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.ImportFrom) and within(inner.module or "", "jaxft"):
                        wrong.append(f"{name_of(file)}:{inner.lineno}")
        if "TYPE_CHECKING" in file.read_text():
            wrong.append(name_of(file))
    assert not wrong


def test_only_configs_meet_a_model_family_and_an_objective():
    interfaces = ("model", "adapted", "model_types")
    plain = ("objective", "metrics", "alarms", "pair")
    wrong = []
    for file in MODULES:
        mine = folder_of(file)
        names = [name.split(".") for name in own_imports(file)]
        families = [n for n in names if n[1] == "models" and len(n) > 2 and n[2] not in interfaces]
        objectives = [n for n in names if n[1] == "objectives" and len(n) > 2 and n[2] not in plain]
        if families and objectives and mine not in ("models", "objectives"):
            wrong.append(name_of(file))
    assert not wrong


def test_nothing_private_unsafe_or_heavy_is_imported():
    forbidden = ("torch", "pickle", "cloudpickle", "dill", "joblib", "jax._src", "jax.experimental.pjit")
    bridges = {"jaxft/models/flax_modules.py": ("flax.nnx", "flax.linen")}  # nothing else imports these files
    wrong = []
    for file in [*MODULES, *SCRIPTS, *CONFIGS]:
        for name in imports(file):
            light = ("flax.struct", "flax.traverse_util", *bridges.get(name_of(file), ()))
            if within(name, *forbidden) or (within(name, "flax") and not within(name, *light)):
                wrong.append(f"{name_of(file)} imports {name}")
            if within(name, *(bridge.removesuffix(".py").replace("/", ".") for bridge in bridges)):
                wrong.append(f"{name_of(file)} imports {name}")
        wrong += [
            f"{name_of(file)}: {name}" for name in attributes(file) if "._src" in name or ".nnx" in name
        ]
        for call in ast.walk(parsed(file)):
            for keyword in call.keywords if isinstance(call, ast.Call) else ():
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if on and keyword.arg in ("allow_pickle", "trust_remote_code"):
                    wrong.append(f"{name_of(file)}:{call.lineno}: {keyword.arg}")
    assert not wrong


def test_only_sharding_writes_a_partition_spec():
    wrong = []
    for file in [*MODULES, *SCRIPTS, *CONFIGS]:
        if file.name == "sharding.py":
            assert "jax.sharding.PartitionSpec" in imports(file)
            wrong += [
                n for n in attributes(file) if n.endswith((".platform", "default_backend", "device_kind"))
            ]
            continue
        for name in {*imports(file), *attributes(file)}:
            if name.split(".")[-1] in ("PartitionSpec", "NamedSharding") or name == "jax.P":
                wrong.append(f"{name_of(file)}: {name}")
    assert not wrong


def test_only_data_and_weights_know_tokenizers_and_file_formats():
    theirs = ("transformers", "tokenizers", "safetensors", "gguf", "datasets", "jinja2")
    wrong = []
    for file in MODULES:
        if folder_of(file) not in ("data", "weights"):
            wrong += [f"{name_of(file)} imports {name}" for name in imports(file) if within(name, *theirs)]
    assert not wrong


def test_only_the_families_write_templates_of_tensor_names_and_only_the_table_fills_them_in():
    """`"{i}" in name`, `name.format(i=i)` and f"model.layers.{i}" belong to nn/tensor_names.py; names of
    GGUF files are translated in gguf_architectures.py.
    """
    fields = ("{i}", "{x}", "model.layers.")
    translated = {"jaxft.nn.tensor_names", "jaxft.weights.gguf.gguf_architectures"}
    for file in MODULES:
        name = module_of(file)
        if not within(name, "jaxft.models") and name not in translated:
            texts = [x for x in literals(file) if isinstance(x, str) and any(f in x for f in fields)]
            assert not texts, f"{name}: {texts}"


def test_importing_a_module_runs_nothing():
    wrong = []
    for file in MODULES:
        for node in parsed(file).body:
            if isinstance(node, ast.Expr):
                text = ast.unparse(node)
                derivative_rule = ".defvjp(" in text or ".defjvp(" in text
                if not isinstance(node.value, ast.Constant) and not derivative_rule:
                    wrong.append(f"{name_of(file)}:{node.lineno}: {text[:60]}")
    assert not wrong


def test_no_type_of_jaxft_has_an_optional_member():
    wrong = []
    for file in [*MODULES, *SCRIPTS, *CONFIGS]:
        for node in ast.walk(parsed(file)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            probe = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
            if probe and not (isinstance(node.args[1], ast.Constant) and node.args[1].value in FOREIGN):
                wrong.append(f"{name_of(file)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not wrong


def is_rank(node):
    """Whether an expression is a number of axes, of an array or of a ParamSpec."""
    text = ast.unparse(node)
    return text.endswith(".ndim") or re.fullmatch(
        r"(np|jnp)\.ndim\(.*\)|len\((.*\.axes|spec\.shape|s\.shape)\)", text
    )


def test_no_number_of_axes_decides_a_meaning():
    """Names of axes do, see nn.param_spec.kernel. A check that only raises may ask for it."""
    wrong = []
    for file in MODULES:
        checks = [
            n for n in ast.walk(parsed(file)) if isinstance(n, ast.If) and isinstance(n.body[0], ast.Raise)
        ]
        allowed = {id(inner) for check in checks for inner in ast.walk(check.test)}
        wrong += [
            f"{name_of(file)}:{node.lineno}: {ast.unparse(node)[:80]}"
            for node in ast.walk(parsed(file))
            if isinstance(node, ast.Compare) and id(node) not in allowed
            if any(map(is_rank, [node.left, *node.comparators]))
        ]
    assert not wrong


def test_only_the_tables_of_axes_and_names_and_model_families_name_experts():
    """Adapters, quantisation, merging, files, optimizers and plans work on them as on any lead axis."""
    named = {name_of(file) for file in MODULES if "expert" in file.read_text()}
    tables = {"jaxft/nn/param_spec.py", "jaxft/nn/tensor_names.py", "jaxft/distributed/sharding.py"}
    tables |= {"jaxft/train/programs.py"}  # the check of mesh.expert
    others = (
        "jaxft/models/",
        "jaxft/weights/gguf/",
        "jaxft/runs/settings/option_names.py",
    )  # families, refusals
    assert {name for name in named if not name.startswith(others)} == tables


def test_nobody_looks_into_a_partial_or_glues_an_attribute_onto_a_function():
    wrong = []
    for file in MODULES:
        functions = {n.name for n in parsed(file).body if isinstance(n, ast.FunctionDef)}
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                on = node.targets[0].value
                if isinstance(on, ast.Name) and on.id in functions:
                    wrong.append(f"{name_of(file)}:{node.lineno}: {ast.unparse(node)[:80]}")
            if isinstance(node, ast.Call) and ".keywords.get" in ast.unparse(node.func):
                wrong.append(f"{name_of(file)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not wrong


def test_nn_and_weights_pass_values_as_arguments_and_results():
    wrong = [
        name_of(f) for f in MODULES if "contextvars" in f.read_text() and folder_of(f) in ("nn", "weights")
    ]
    assert not wrong


def test_a_public_name_means_one_thing():
    where = defaultdict(list)
    for file in MODULES:
        for node in parsed(file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            else:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                if not name.startswith("_") and len(name) > 1:  # T is a type variable
                    where[name].append(name_of(file))
    where = {name: sorted(set(files)) for name, files in where.items()}
    twice = {name: files for name, files in where.items() if len(files) > 1 and name not in SHARED_NAMES}
    assert not twice
    assert all(len(where[name]) > 1 for name in SHARED_NAMES), (
        "SHARED_NAMES lists a name that is unique by now"
    )


def test_functions_have_at_most_six_parameters():
    wrong = []
    for file in MODULES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls")])
                if count > 6:
                    wrong.append(f"{name_of(file)}:{node.lineno}: {node.name} has {count} parameters")
    assert not wrong


def listed_files(docstring):
    """["a.py", "b.py"]: the files that a folder's docstring names at the beginnings of its lines."""
    lines = re.findall(r"^((?:\w+\.\w+, )*\w+\.\w+): ", docstring, re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


def test_a_folders_docstring_has_a_line_for_each_of_its_files_and_folders():
    wrong = []
    for package in PACKAGES:
        listed = listed_files(ast.get_docstring(parsed(package / "__init__.py")) or "")
        there = [file.name for file in package.iterdir() if file.is_file() and file.name != "__init__.py"]
        missing = {name for name in there if name.endswith(".py")} - {*listed}
        wrong += [f"{name_of(package / '__init__.py')} lacks a line for {name}" for name in sorted(missing)]
        wrong += [f"{name_of(package / '__init__.py')} lists {name}" for name in listed if name not in there]
        contents = (ast.get_docstring(parsed(package / "__init__.py")) or "").splitlines()
        inner = [other.name for other in PACKAGES if other.parent == package]
        missing = {name for name in inner if not any(line.startswith(f"{name}/: ") for line in contents)}
        wrong += [f"{name_of(package / '__init__.py')} lacks a line for {name}/" for name in sorted(missing)]
    assert not wrong


def test_the_tour_names_every_folder_in_the_order_of_imports():
    tour = (ROOT / "jaxft" / "README.md").read_text()
    rows = tour.partition("## Folder by folder")[2].partition("\n## ")[0]
    first = [
        re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1]) for row in rows.splitlines() if row[:3] == "| `"
    ]
    names = [name for row in first for name in row]
    assert sorted(names) == sorted(LEVEL)
    assert [LEVEL[name] for name in names] == sorted(LEVEL[name] for name in names)
    assert len(tour.splitlines()) <= 120


def test_every_path_that_the_tour_names_exists():
    tour = (ROOT / "jaxft" / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", tour)
    paths = re.findall(r"`([\w/]+/(?:\w+\.\w+)?)`", tour)
    assert len(links) > 5 and len(paths) > 20
    assert not [p for p in links + paths if not any((ROOT / top / p).exists() for top in ("jaxft", "."))]


def test_the_readmes_command_for_tests_with_time_limits_finds_all_of_them():
    (command,) = re.findall(r'pytest .*-m "alone and not slow".*', (ROOT / "README.md").read_text())
    tests = [f for f in (ROOT / "tests").rglob("test_*.py") if f.parent != ROOT / "tests"]
    folders = [f.relative_to(ROOT).parts[1] for f in tests if "mark.alone" in f.read_text()]
    assert len(folders) > 1 and all(f" tests/{folder}" in command for folder in folders)


def literals(file):
    """String literals of a file other than docstrings, and tuples of numbers."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        numbers = [e for e in ast.iter_child_nodes(node) if isinstance(e, ast.Constant)]
        if isinstance(node, ast.Tuple) and sum(isinstance(e.value, int | float) for e in numbers) > 1:
            yield ast.unparse(node)


def passages(file, length=6):
    """Runs of `length` lines of the functions' bodies, without their strings and numbers."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef):
            start = node.body[min(1, len(node.body) - 1)].lineno  # after the docstring
            lines = file.read_text().splitlines()[start - 1 : node.end_lineno]
            plain = [re.sub(r"\"[^\"]*\"|\b[\d.][\w.-]*", "_", line).strip() for line in lines]
            plain = [line for line in plain if line.strip("()[]{}, ")]
            yield from (tuple(plain[i : i + length]) for i in range(len(plain) - length + 1))


def test_no_config_literal_or_passage_is_in_two_configs():
    where = defaultdict(set)
    for file in (ROOT / "configs").glob("*.py"):
        for found in [*literals(file), *passages(file)]:
            where[found].add(file.name)
    twice = {found: sorted(files) for found, files in where.items() if len(files) > 1}
    allowed = {"reward"}  # the name of a recipe, and of a head in another one
    assert {found: files for found, files in twice.items() if found not in allowed} == {}


IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
from pathlib import Path
sys.modules["torch"] = None  # import torch fails, as where it isn't installed
root, folder = map(Path, sys.argv[1:])
import jaxft
for module in pkgutil.walk_packages(jaxft.__path__, "jaxft."):
    importlib.import_module(module.name)
for file in [*(root / "configs").glob("*.py"), *(root / "scripts").glob("*.py")]:
    spec = importlib.util.spec_from_file_location(f"file_{file.stem}", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
import jax
jax.config.update("jax_num_cpu_devices", 3)  # an error once a backend has started
assert jax.device_count() == 3
sys.path.insert(0, str(root / "tests" / "support"))
from tiny_llama import tiny_tokenizer
tiny_tokenizer().save_pretrained(str(folder))
tokenizer = jaxft.weights.pretrained.load_tokenizer(str(folder))
assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<s>a</s>"
assert sys.modules["torch"] is None
print("all imported")
"""


def test_every_module_config_and_script_imports_without_torch_and_starts_no_backend(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, "-W", "error:::jaxft", "-c", IMPORT_ALL, str(ROOT), str(tmp_path / "folder")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("all imported"), done.stderr[-2000:]
