"""Read the options of TRL's configuration dataclasses from Python files and notebooks.

The file is parsed and never executed: a value is a literal, arithmetic of numbers, or a name that the file
sets to one of these. Any other value is an Expression, which convert reports.
"""

import ast
import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxft.cli.convert.draft import Expression, ForeignConfig, GivenOption, check_count
from jaxft.cli.convert.python_rows import call_name, row_options
from jaxft.cli.convert.yaml_and_shell import read_commands, trainer_of
from jaxft.runs.settings.option import TRL, UNSLOTH

CONFIGS = {  # class or function whose arguments are options -> training method, "" for any method
    "SFTConfig": "sft", "DPOConfig": "dpo", "GRPOConfig": "grpo", "RLOOConfig": "rloo", "KTOConfig": "kto",
    "RewardConfig": "reward", "ORPOConfig": "orpo", "CPOConfig": "cpo", "OnlineDPOConfig": "online_dpo",
    "PPOConfig": "ppo", "GKDConfig": "gkd", "BCOConfig": "bco", "PRMConfig": "prm", "TrainingArguments": "",
    "UnslothTrainingArguments": "", "LoraConfig": "", "BitsAndBytesConfig": "", "ModelConfig": "",
    "ScriptArguments": "", "get_peft_model": "", "Seq2SeqTrainingArguments": "",
}  # fmt: skip
TRAINER_CLASSES = {
    "SFTTrainer": "sft", "DPOTrainer": "dpo", "GRPOTrainer": "grpo", "RLOOTrainer": "rloo",
    "KTOTrainer": "kto", "RewardTrainer": "reward", "ORPOTrainer": "orpo", "CPOTrainer": "cpo",
    "OnlineDPOTrainer": "online_dpo", "PPOTrainer": "ppo", "GKDTrainer": "gkd", "BCOTrainer": "bco",
    "PRMTrainer": "prm",
}  # fmt: skip
PASSED_ON = (  # arguments of trainers whose values are made by other calls, which are read
    "model", "args", "processing_class", "tokenizer", "peft_config", "train_dataset", "eval_dataset",
    "quantization_config",
)  # fmt: skip
OTHER_CALLS = {  # function that no setting expresses -> what to do instead
    "train_on_responses_only": "nothing to write for conversations: only responses have a loss by default; "
    "rows with one column `text` have a loss on all tokens",
    "save_pretrained_merged": "after the run: jaxft export --run runs/NAME --out merged",
    "save_pretrained_gguf": "after the run: jaxft export --run runs/NAME --out NAME.gguf --gguf TYPE, such "
    "as Q4_K_M for q4_k_m",
    "push_to_hub_gguf": "after the run: jaxft export with --gguf, then jaxft push",
    "push_to_hub_merged": "after the run: jaxft export, then jaxft push",
}
PARSERS = {"TrlParser", "HfArgumentParser"}  # a file that calls one reads its options from a command line
# Options that are read from the code also where the others come from a command line
IN_CODE = ("reward_funcs", "dataset_name", "dataset_config", "dataset_train_split", "formatting_func",
           "compute_metrics", "data_collator", "callbacks", "early_stopping_patience", "max_samples",
           "eval_dataset", "test_split_size", "test_split_seed")  # fmt: skip
# Options of the code that are not read if the command line names a dataset
OF_ROWS = ("eval_dataset", "dataset.load_dataset", "dataset_config", "dataset_train_split")
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def notebook_code(file: Path, text: str) -> str:
    """Return the code of a notebook's cells; lines of ! and % commands become empty. text: the file's.

    Raises ValueError for any other file.
    """
    try:
        cells = json.loads(text)["cells"]
        sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not a notebook (JSON with cells); save it as .ipynb again") from error
    lines = [line for source in sources for line in "".join(source).split("\n")]
    return "\n".join("" if line.lstrip().startswith(("!", "%")) else line for line in lines)


def read_python(file: Path, text: str) -> ForeignConfig:
    """Return the options of a Python file, from its calls of TRL's configuration classes (CONFIGS).

    Without these, or in a file that parses a command line, they come from the command in its docstring, and a
    few from the code (IN_CODE).
    Raises ValueError with one line for a file that cannot be parsed or has no options.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"{file}:{error.lineno}: syntax error: {error.msg}; correct it") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{file}: not a Python file that can be parsed; correct it, or convert a YAML file"
        ) from error
    try:
        options, trainers = _options(tree)
    except RecursionError as error:
        raise ValueError(
            f"{file}: an expression is nested too deeply; write it in several statements"
        ) from error
    calls = {call_name(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if calls & PARSERS or not calls & CONFIGS.keys():
        source = _docstring(file, tree)
        taken = {option.name for option in source.options}
        of_code = [option for option in options if option.name in IN_CODE or option.name[:8] == "dataset."]
        if taken & {"dataset_name", "datasets"}:  # the command's rows, and load_dataset is given these
            of_code = [option for option in of_code if option.name not in OF_ROWS]
        further = [option for option in of_code if option.name not in taken]
        trainer = next((trainer for trainer in trainers if trainer), source.trainer)
        return replace(source, options=(*source.options, *further), trainer=trainer)
    imported = {name.split(".")[0] for name in _imports(tree)}
    tool = UNSLOTH if "unsloth" in imported else TRL
    lora = bool(calls & {"LoraConfig", "get_peft_model"}) or None
    check_count(file, tuple(options))
    trainer = next((trainer for trainer in trainers if trainer), trainer_of(file.name))
    return ForeignConfig(file, tool, tuple(options), trainer, lora or False)


def _docstring(file: Path, tree: ast.Module) -> ForeignConfig:
    """Read the command in a file's docstring (the first string with an --option), as in TRL's scripts."""
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            value = node.value.value
            if isinstance(value, str) and "--" in value:
                source = read_commands(file, value, node.lineno)
                note = "the options come from the command in the file's docstring"
                return replace(source, notes=(note, *source.notes))
    known = ", ".join(name for name in CONFIGS if name.endswith("Config"))
    raise ValueError(
        f"{file} calls none of {known} with options and has no command in its docstring; "
        "name the file that does"
    )


def _options(tree: ast.Module) -> tuple[list[GivenOption], list[str]]:
    """Return (options, training methods) of a file's calls, in their order in the file.

    Of options with the same name the last value counts. methods: the value in CONFIGS or TRAINER_CLASSES of
    each class that is called, "" for any method.
    """
    names, stoppers = _assignments(tree), _stoppers(tree)
    options: list[GivenOption] = []
    trainers: list[str] = []
    for node in sorted(
        (n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset)
    ):
        name, owner = call_name(node.func), _owner(node.func)
        if name in CONFIGS:
            trainers.append(CONFIGS[name])
            if CONFIGS[name] or name.endswith("TrainingArguments"):
                options += _positional(node, names, "output_dir")
            options += _keywords(node, names)
        elif name in TRAINER_CLASSES:
            trainers.append(TRAINER_CLASSES[name])
            known = {*PASSED_ON, *(["callbacks"] if _stops_early(node, stoppers) else [])}
            options += [option for option in _keywords(node, names) if option.name not in known]
            options += _model(node, names)
        elif name == "get_chat_template":  # Unsloth's
            options += (
                GivenOption("chat_template", _value(k.value, names), node.lineno)
                for k in node.keywords
                if k.arg == "chat_template"
            )
        elif name == "from_pretrained" and owner.startswith(("AutoModelFor", "Fast")):
            options += _model(node, names)
            options += [option for option in _keywords(node, names) if option.name != "model_name"]
        elif name == "EarlyStoppingCallback":
            options += _positional(node, names, "early_stopping_patience")
            options += _keywords(node, names)
        elif name in OTHER_CALLS:
            options.append(GivenOption(name, ast.unparse(node), node.lineno, OTHER_CALLS[name]))
    options += row_options(tree, partial(_value, names=names))
    unique = {option.name: option for option in options}
    return list(unique.values()), trainers


def _keywords(node: ast.Call, names: dict[str, Any]) -> Iterator[GivenOption]:
    for keyword in node.keywords:
        line = keyword.value.lineno
        if keyword.arg is None:
            yield GivenOption("**" + ast.unparse(keyword.value), Expression(ast.unparse(keyword.value)), line)
        else:
            value = _value(keyword.value, names)
            yield GivenOption(keyword.arg, value, line)


def _positional(node: ast.Call, names: dict[str, Any], first: str) -> Iterator[GivenOption]:
    """Yield the positional arguments of a call as options. names: known names -> values. first: the option
    that the first argument sets. Later arguments get a remark, since their names are not known.
    """
    for index, argument in enumerate(node.args):
        if index == 0:
            yield GivenOption(first, _value(argument, names), argument.lineno)
        else:
            name = f"{call_name(node.func)}.argument_{index + 1}"
            remark = "an argument without a name; write its name in the file"
            yield GivenOption(name, ast.unparse(argument), argument.lineno, remark)


def _stoppers(tree: ast.Module) -> set[str]:
    """Return the source of all EarlyStoppingCallback calls, and the names that the file assigns them to."""
    stopping = {ast.unparse(node) for node in ast.walk(tree)
             if isinstance(node, ast.Call) and call_name(node.func) == "EarlyStoppingCallback"}  # fmt: skip
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    return stopping | {ast.unparse(target) for node in assigned if ast.unparse(node.value) in stopping
                    for target in node.targets}  # fmt: skip


def _stops_early(node: ast.Call, stoppers: set[str]) -> bool:
    """Whether a trainer's call has callbacks=[...] and all of them are `stoppers` (see _stoppers)."""
    given = next((k.value for k in node.keywords if k.arg == "callbacks"), None)
    return isinstance(given, ast.List) and all(ast.unparse(each) in stoppers for each in given.elts)


def _model(node: ast.Call, names: dict[str, Any]) -> Iterator[GivenOption]:
    """Yield the option model_name_or_path of a call: `model`, `model_name` or else the first argument. names:
    known names -> values. Yields nothing if the argument is not a string.
    """
    named = [k.value for k in node.keywords if k.arg in ("model", "model_name")]
    argument = next(iter([*named, *node.args]), None)
    value = None if argument is None else _value(argument, names)
    if isinstance(value, str):
        yield GivenOption("model_name_or_path", value, node.lineno)


def _assignments(tree: ast.Module) -> dict[str, Any]:
    """Return name -> value for each `name = value` of the file, also within functions and loops. A name that
    is set twice, by `+=` or by `for` has an Expression as its value. Names in tuples (`a, b = x`) are left
    out.
    """
    names: dict[str, Any] = {}
    seen: set[str] = set()
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        value: ast.expr | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        elif isinstance(node, ast.AugAssign | ast.For):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                known = value is not None and target.id not in seen
                names[target.id] = _value(value, names) if value and known else Expression(target.id)
                seen.add(target.id)
    return names


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of an expression without running it; an Expression if that is not possible.

    torch.bfloat16 is "bfloat16". names: known names -> values.
    """
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError):
        pass
    unknown = Expression(ast.unparse(node))
    if isinstance(node, ast.Name):
        return names.get(node.id, unknown)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(item, names) for item in node.elts]
        return unknown if any(isinstance(item, Expression) for item in items) else items
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key, names) for key in node.keys]
        values = [_value(value, names) for value in node.values]
        return dict(zip(keys, values, strict=True)) if all(isinstance(k, str) for k in keys) else unknown
    if isinstance(node, ast.JoinedStr):
        parts = [_value(part.value if isinstance(part, ast.FormattedValue) else part, names)
                 for part in node.values]  # fmt: skip
        return "".join(map(str, parts)) if all(isinstance(p, str | int | float) for p in parts) else unknown
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        sides = [_value(side, names) for side in (node.left, node.right)]
        if all(isinstance(side, int | float) and abs(side) < 2**53 for side in sides):
            try:
                return ARITHMETIC[type(node.op)](*sides)
            except (ArithmeticError, ValueError):
                return unknown
    return unknown


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def _owner(node: ast.expr) -> str:
    """Return the name before the dot, such as FastModel in FastModel.from_pretrained, "" without a dot."""
    return call_name(node.value) if isinstance(node, ast.Attribute) else ""
