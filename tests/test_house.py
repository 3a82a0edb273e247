"""Who may import whom, what is never imported, and that all of it imports without torch."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each layer imports itself and what stands above it here. A package stands for its modules.
LAYERS = (
    {
        "tree",
        "batch",
        "quant",
        "quant_formats",
        "metrics",
        "devices",
        "hlo",
        "traffic",
        "machines",
        "roofline",
    },
    {"sharding", "params", "agree", "manifest", "readback", "ending", "launch", "distributed", "watchdog"},
    {"nn", "attention", "flash", "lora", "consumed"},
    {"models", "objectives", "data"},  # never one another
    {
        "optim",
        "optim_states",
        "in_backward",
        "calibrate",
        "generate",
        "checkpoint",
        "weights",
        "log",
        "describe",
        "runfolder",
        "accumulate",
        "reference",
        "plots",
        "compare",
        "advantages",
        "estimates",
        "rewards",
        "completions",
        "player",
        "rollout",
        "ranked",
    },  # fmt: skip
    {
        "train",
        "programs",
        "evaluate",
        "prepare",
        "export",
        "report",
        "samples",
        "together",
        "sweep",
        "sweep_programs",
        "scorer",
        "starts",
    },  # fmt: skip
    {"flops", "plan", "plan_programs", "plan_search", "plan_text"},
    {"config", "parse", "cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
APART = ("models", "objectives", "data")

MODULES = sorted(p for p in (ROOT / "jaxft").rglob("*.py") if p != ROOT / "jaxft" / "__init__.py")
EDGES = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "configs").glob("*.py")])
named = {"ids": lambda p: p.relative_to(ROOT).as_posix()}


def part_of(file):
    """`nn` for jaxft/nn.py, `weights` for jaxft/weights/hf.py."""
    return file.relative_to(ROOT / "jaxft").with_suffix("").parts[0]


@functools.cache
def parsed(file):
    return ast.parse(file.read_text())


@functools.cache
def imports(file):
    """Every module or name that a file imports, wherever in it, as dotted text: `from a import b` is "a.b"."""
    found = []
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


@functools.cache
def attributes(file):
    """Every dotted chain of names in a file: "jax.sharding.Mesh"."""
    return {
        ast.unparse(node) for node in ast.walk(parsed(file)) if isinstance(node, ast.Attribute | ast.Name)
    }


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def test_every_module_has_a_place_and_every_place_a_module():
    assert {part_of(file) for file in MODULES} == LEVEL.keys()


@pytest.mark.parametrize("file", MODULES, **named)
def test_imports_go_one_way(file):
    mine = part_of(file)
    for name in imports(file):
        if not within(name, "jaxft") or name == "jaxft.__version__":
            continue
        other = name.split(".")[1]
        assert other in LEVEL, f"{name}: import modules by their names"
        assert LEVEL[other] <= LEVEL[mine], f"{mine} is below {other} and must not import it"
        if mine in APART and other in APART:
            assert mine == other, f"{mine} and {other} must not know each other"


@pytest.mark.parametrize("file", MODULES, **named)
def test_only_configs_meet_a_model_and_an_objective(file):
    names = [name for name in imports(file) if within(name, "jaxft.objectives")]
    assert part_of(file) == "objectives" or not names


@pytest.mark.parametrize("file", [*MODULES, *EDGES], **named)
def test_what_is_never_imported(file):
    for name in imports(file):
        assert not within(
            name, "torch", "pickle", "cloudpickle", "dill", "joblib", "jax._src", "jax.experimental.pjit"
        ), name
        assert not within(name, "flax") or within(name, "flax.struct", "flax.linen"), name
    for name in attributes(file):
        assert "._src" not in name and ".nnx" not in name
    keywords = [k for n in ast.walk(parsed(file)) if isinstance(n, ast.Call) for k in n.keywords]
    for k in keywords:
        on = isinstance(k.value, ast.Constant) and k.value.value is True
        assert not (on and k.arg in ("allow_pickle", "trust_remote_code"))


@pytest.mark.parametrize("file", [*MODULES, *EDGES], **named)
def test_only_sharding_writes_a_partition_spec(file):
    if file.name == "sharding.py":
        assert "jax.sharding.PartitionSpec" in imports(file)
        assert not [
            name
            for name in attributes(file)
            if name.endswith((".platform", "default_backend", "device_kind"))
        ]
        return
    names = {*imports(file), *attributes(file)}
    assert not [
        name for name in names if name.split(".")[-1] in ("PartitionSpec", "NamedSharding") or name == "jax.P"
    ]


@pytest.mark.parametrize("file", MODULES, **named)
def test_only_data_and_weights_know_tokenizers_and_file_formats(file):
    theirs = ("transformers", "tokenizers", "safetensors", "gguf", "datasets", "jinja2")
    assert part_of(file) in ("data", "weights") or not [
        name for name in imports(file) if within(name, *theirs)
    ]


@pytest.mark.parametrize("file", MODULES, **named)
def test_importing_sets_nothing(file):
    for node in parsed(file).body:
        if isinstance(node, ast.Expr):
            fine = isinstance(node.value, ast.Constant) or ".defvjp(" in ast.unparse(
                node
            )  # docstrings, derivative rules
            assert fine, f"line {node.lineno}: a statement that runs at import"


ALL = """
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
sys.path.insert(0, str(root / "tests"))
from tiny_llama import tiny_tokenizer
tiny_tokenizer().save_pretrained(str(folder))
found = jaxft.weights.pretrained.load_tokenizer(str(folder))
assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<s>a</s>"
assert sys.modules["torch"] is None
print("all imported")
"""


def test_every_module_config_and_script_imports_without_torch_and_starts_no_backend(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, "-W", "error:::jaxft", "-c", ALL, str(ROOT), str(tmp_path / "folder")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("all imported"), done.stderr[-2000:]
