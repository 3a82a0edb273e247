"""Read which rows a Python file or notebook trains on, from its calls of the library `datasets`.

The rows are followed from load_dataset to the trainer. A call between them that no setting expresses becomes
an option with a remark. The file is parsed and never executed.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from os.path import normpath
from typing import Any

from jaxft.cli.convert.draft import GivenOption

BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # path= of load_dataset for files of data_files=
# Calls that are reported if their rows are not followed to the trainer
UNSEEN = ("map", "filter", "select", "train_test_split", "rename_column", "rename_columns",
          "concatenate_datasets", "interleave_datasets")  # fmt: skip
UNNEEDED = ("remove_columns", "set_format", "with_format", "flatten_indices")  # have no effect on training
# Arguments of load_dataset that are converted or need no setting
LOADING = ("path", "name", "split", "data_files", "streaming", "num_proc", "cache_dir", "token",
           "trust_remote_code", "keep_in_memory", "download_mode", "verification_mode")  # fmt: skip
DEFAULT_TEST_SIZE = 0.25  # of train_test_split
REMARKS = {  # a call on rows -> what to do in its place
    "map": "code is not run; write rows in their final form, or name columns by data.columns=",
    "filter": "code is not run, so all rows are read; write the filtered rows to a file for data=",
    "select": "only the first rows can be selected: data.max_samples=1000",
    "train_test_split": "held_out=0.1 holds out a fraction, and the other rows are trained on",
}
OTHER = "jaxft does not call it; write rows in their final form"
UNTRACED = "jaxft cannot follow these rows back to one load_dataset"


@dataclass(frozen=True)
class DatasetCall:
    """Rows of one load_dataset call, and the calls that change them.

    load: the load_dataset call. path, config, files, split: its path, name, data_files and split. part: the
    split as written if it is a slice or a sum, such as train[:90%]. parts: the items of split=[...] before
    one is chosen. divided: the train_test_split call; half: the part of its result, "train" or "test", "" for
    both. selected: the call that takes the first rows; first: how many; shuffled: the last shuffle before it.
    calls: all other calls that change the rows.
    """

    load: ast.Call
    path: str
    config: str | None
    files: Any
    split: str | None
    part: str = ""
    divided: ast.Call | None = None
    half: str = ""
    first: int | None = None
    selected: ast.Call | None = None
    shuffled: ast.Call | None = None
    calls: tuple[ast.Call, ...] = ()
    parts: tuple[str, ...] = ()

    def overlaps(self, other: "DatasetCall") -> bool:
        """Whether both read the same split of a dataset, or a common file."""
        if self.is_file and other.is_file:
            return not set(map(normpath, self._names())).isdisjoint(map(normpath, other._names()))
        split = self.split or "train"
        return (self.path, self.config, split) == (other.path, other.config, other.split or "train")

    def rest(self, other: "DatasetCall") -> float | None:
        """Return the fraction of a split in `other`, if `self` is the remainder of the split; else None.

        It is 0.1 for self = train[:90%] and other = train[90%:].
        """
        first, last = (re.fullmatch(r"\w+\[(:?)(\d{1,2})%(:?)\]", rows.part) for rows in (self, other))
        if first is None or last is None or first[2] != last[2] or {first[1], last[1]} != {"", ":"}:
            return None
        if first[1] == first[3] or last[1] == last[3] or not self.overlaps(other):
            return None
        return (int(first[2]) if last[1] else 100 - int(first[2])) / 100 or None

    @property
    def is_file(self) -> bool:
        """Whether the rows are in the files that data_files names."""
        return self.path in BUILDERS and bool(self._names())

    @property
    def known(self) -> bool:
        """Whether the call names its rows by literals: a dataset's path, or files in data_files."""
        return self.path not in BUILDERS or self.is_file

    @property
    def reference(self) -> str:
        """The files of the rows, separated by commas, or the dataset's path."""
        return ",".join(self._names()) if self.is_file else self.path

    def _names(self) -> list[str]:
        files = self.files.get(self.split or "train") if isinstance(self.files, dict) else self.files
        names = files if isinstance(files, list | tuple) else [files]
        return [name for name in names if isinstance(name, str)]


def call_name(node: ast.expr) -> str:
    """Return "name" for the expressions `name` and `owner.name`, "" for any other."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def row_options(tree: ast.Module, value: Callable[[ast.expr], Any]) -> list[GivenOption]:
    """Return the options about training and evaluation rows in a file's code. value: returns the value of an
    expression, or an Expression if it cannot be known.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    follow = _Followed(tree, value)
    given: dict[str, ast.expr] = {}
    for call in calls:
        if call_name(call.func).endswith("Trainer"):
            for keyword in call.keywords:
                if keyword.arg in ("train_dataset", "eval_dataset"):
                    given.setdefault(keyword.arg, keyword.value)
    options: list[GivenOption] = []
    train, held = (follow.rows(given.get(name)) for name in ("train_dataset", "eval_dataset"))
    if train is None:
        loads = (call for call in calls if call_name(call.func) == "load_dataset")
        train = next(filter(None, map(follow.rows, loads)), None)
        if train is not None and "train_dataset" in given:
            node = given["train_dataset"]
            remark = f"{UNTRACED}; data= has the rows of the file's first load_dataset"
            options.append(GivenOption("train_dataset", ast.unparse(node), node.lineno, remark))
    if train is not None:
        options += _train(train)
    if train is not None and train.divided is not None and train.half == "train":
        options += _divided(train.divided, value, held)
    if "eval_dataset" in given and _is_none(given["eval_dataset"]):
        options.append(GivenOption("eval_dataset", None, given["eval_dataset"].lineno))
    elif "eval_dataset" in given:
        options += _evaluation(given["eval_dataset"], train, held)
    for load in {id(rows.load): rows.load for rows in (train, held) if rows}.values():
        options += [
            GivenOption(f"dataset.{keyword.arg or '**'}", ast.unparse(keyword.value), keyword.value.lineno,
                        "an argument of load_dataset that is not converted")
            for keyword in load.keywords if keyword.arg not in LOADING
        ]  # fmt: skip
    followed = {
        id(call) for rows in (train, held) if rows
        for call in (*rows.calls, rows.divided, rows.load, rows.selected)
    }  # fmt: skip
    changes = {id(call): call for rows in (train, held) if rows for call in rows.calls}
    sampled = {id(rows.shuffled) for rows in (train, held) if rows and rows.shuffled is not None}
    if train is not None and held is not None and train.rest(held) is not None:
        changes = {key: call for key, call in changes.items() if call not in (train.load, held.load)}
    for call in sorted(changes.values(), key=lambda call: (call.end_lineno or 0, call.end_col_offset or 0)):
        options.append(_change(call, id(call) in sampled, value))
    if train is not None:
        for call in calls:
            if id(call) not in followed and call_name(call.func) in ("load_dataset", *UNSEEN):
                remark = "not followed to the trainer's rows; write these rows to a file for data= yourself"
                options.append(_named(call, remark))
    return _numbered(options)


def _train(train: DatasetCall) -> Iterator[GivenOption]:
    line = train.load.lineno
    if not train.known:
        yield _named(train.load, "data_files has no files that convert can find; set data=")
        return
    yield GivenOption("dataset_name", train.reference, line)
    if train.config is not None:
        yield GivenOption("dataset_config", train.config, line)
    if train.split is not None and not train.is_file:
        yield GivenOption("dataset_train_split", train.split, line)
    if train.files is not None and not train.is_file:
        yield GivenOption("data_files", str(train.files), line, "data= reads all files of the dataset")
    if train.first is not None:
        yield GivenOption("max_samples", train.first, line)
    if train.divided is not None and train.half != "train":
        yield _named(train.divided, REMARKS["train_test_split"])


def _divided(
    call: ast.Call, value: Callable[[ast.expr], Any], held: DatasetCall | None
) -> Iterator[GivenOption]:
    """Yield the options test_split_size and test_split_seed of a train_test_split call whose part "train" is
    trained on. held: the rows of eval_dataset=, None if they are unknown.
    """
    given = {keyword.arg: value(keyword.value) for keyword in call.keywords if keyword.arg}
    size = value(call.args[0]) if call.args else given.get("test_size")
    rest = given.get("train_size")
    if size is None and isinstance(rest, float):
        size = round(1 - rest, 6)
    if size is None and rest is None:
        size = DEFAULT_TEST_SIZE
    if held is not None and held.divided is not call:
        yield _named(call, "held_out= has other rows, so all of these are trained on")
    elif not isinstance(size, float) or not 0 < size < 1:
        yield _named(call, "held_out= takes a fraction, such as held_out=0.1")
    else:
        line = call.end_lineno
        yield GivenOption("test_split_size", size, line)
        if "seed" in given:
            yield GivenOption("test_split_seed", given["seed"], line)


def _evaluation(node: ast.expr, train: DatasetCall | None, held: DatasetCall | None) -> Iterator[GivenOption]:
    """Yield the option eval_dataset, unless its rows are the part "test" of train_dataset's train_test_split.
    node: the trainer's argument. train, held: the rows of train_dataset and of `node`, None if unknown.
    """
    text, line = ast.unparse(node), node.lineno
    if held is None or not held.known:
        yield GivenOption("eval_dataset", text, line, f"{UNTRACED}; write held_out=FILE or held_out=0.1")
    elif train is None or not held.overlaps(train):
        item: dict[str, Any] = {"path": held.reference}
        if held.config is not None:
            item["name"] = held.config
        if not held.is_file:
            item["split"] = held.split or "train"
        if held.part or held.divided is not None:
            yield GivenOption("eval_dataset.part", text, line, "all rows of this dataset are evaluated")
        if held.first is not None:
            item["max_samples"] = held.first
        yield GivenOption("eval_dataset", item, line)
    elif train.divided is not None and (train.half, held.half) == ("train", "test"):
        if train.divided is not held.divided:
            remark = "from another train_test_split than train_dataset; held_out= is from train_dataset's"
            yield GivenOption("eval_dataset", text, line, remark)
    elif (fraction := train.rest(held)) is not None:
        yield GivenOption("eval_dataset", fraction, line)
    else:
        remark = "training rows, or a part of them; held_out=0.1 holds out rows that are not trained on"
        yield GivenOption("eval_dataset", text, line, remark)


def _change(call: ast.Call, sampled: bool, value: Callable[[ast.expr], Any]) -> GivenOption:
    """Return an option for a call that changes rows, with a remark if no setting expresses it. sampled: the
    call is a shuffle, and a select or take of the first rows follows it.
    """
    name = call_name(call.func)
    if name == "shuffle":
        return _named(call, "max_samples= reads the first rows, not shuffled ones" if sampled else "")
    if name in UNNEEDED:
        return _named(call, "")
    names = [value(argument) for argument in call.args]
    if name == "rename_column" and len(names) == 2 and all(isinstance(each, str) for each in names):
        return _named(call, f"set data.columns={names[1]}={names[0]}")
    if name == "load_dataset":
        return _named(call, "the full split is read; data.max_samples=1000 reads the first rows")
    return _named(call, REMARKS.get(name, OTHER))


def _named(call: ast.Call, remark: str) -> GivenOption:
    name = call_name(call.func)
    arguments = [*map(ast.unparse, call.args)]
    arguments += [ast.unparse(k.value) if k.arg is None else f"{k.arg}={ast.unparse(k.value)}"
                  for k in call.keywords]  # fmt: skip
    line = call.func.end_lineno if isinstance(call.func, ast.Attribute) else call.lineno
    return GivenOption(f"dataset.{name}", f"{name}({', '.join(arguments)})", line, remark)


def _numbered(options: list[GivenOption]) -> list[GivenOption]:
    """Make the options' names unique: the second dataset.map becomes dataset.map.2."""
    seen: dict[str, int] = {}
    numbered = []
    for option in options:
        seen[option.name] = count = seen.get(option.name, 0) + 1
        numbered.append(option if count == 1 else option._replace(name=f"{option.name}.{count}"))
    return numbered


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


class _Followed:
    """Follows an expression back to load_dataset; a name stands for its last assignment above. tree: the
    file. value: returns the value of an expression, or an Expression if it cannot be known.
    """

    def __init__(self, tree: ast.Module, value: Callable[[ast.expr], Any]) -> None:
        self.value = value
        self.assigned: dict[str, list[tuple[int, ast.expr]]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._assign(target, node.value, node.end_lineno or node.lineno)

    def _assign(self, target: ast.expr, value: ast.expr, line: int) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            for index, each in enumerate(target.elts):
                parts = value.elts if isinstance(value, ast.Tuple) else []
                item = ast.copy_location(ast.Subscript(value, ast.Constant(index), ast.Load()), value)
                self._assign(each, parts[index] if index < len(parts) else item, line)
        elif isinstance(target, ast.Name | ast.Subscript):
            self.assigned.setdefault(ast.unparse(target), []).append((line, value))

    def rows(self, node: ast.expr | None) -> DatasetCall | None:
        """Return the rows that an expression stands for, None if it does not lead to a load_dataset call."""
        if isinstance(node, ast.Name | ast.Subscript):
            above = [each for each in self.assigned.get(ast.unparse(node), ()) if each[0] < node.lineno]
            if above:
                return self.rows(max(above, key=lambda each: each[0])[1])
        if isinstance(node, ast.IfExp) and _is_none(node.orelse):
            return self.rows(node.body)
        if isinstance(node, ast.Subscript):
            return self._part(self.rows(node.value), self.value(node.slice))
        if isinstance(node, ast.Call) and call_name(node.func) == "load_dataset":
            return self._loaded(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            rows = self.rows(node.func.value)
            return None if rows is None else self._called(rows, node)
        return None

    def _part(self, rows: DatasetCall | None, key: Any) -> DatasetCall | None:
        if rows is None:
            return None
        if type(key) is int and 0 <= key < len(rows.parts):
            return self._split(replace(rows, parts=()), rows.parts[key])
        if not isinstance(key, str):
            return None
        if rows.divided is not None and not rows.half:
            return replace(rows, half=key) if key in ("train", "test") else None
        return replace(rows, split=key) if rows.split is None else None

    def _called(self, rows: DatasetCall, node: ast.Call) -> DatasetCall:
        name = call_name(node.func)
        if name == "train_test_split" and rows.divided is None:
            return replace(rows, divided=node)
        count = self._count(node, name)
        if count is not None and rows.divided is None and rows.first is None:
            shuffled = [call for call in rows.calls if call_name(call.func) == "shuffle"]
            return replace(rows, first=count, selected=node, shuffled=shuffled[-1] if shuffled else None)
        return replace(rows, calls=(*rows.calls, node))

    def _count(self, node: ast.Call, name: str) -> int | None:
        """Return n for a call select(range(n)) or take(n), None for any other. name: the call's function."""
        argument = node.args[0] if len(node.args) == 1 else None
        if name == "select" and isinstance(argument, ast.Call) and call_name(argument.func) == "range":
            bounds = [self.value(each) for each in argument.args]
            argument = argument.args[-1] if bounds and bounds[:-1] in ([], [0]) else None
        elif name != "take":
            return None
        count = None if argument is None else self.value(argument)
        return count if type(count) is int and count > 0 else None

    def _loaded(self, node: ast.Call) -> DatasetCall | None:
        given = {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
        path, config = (
            self.value(node.args[i]) if len(node.args) > i else given.get(name)
            for i, name in enumerate(("path", "name"))
        )
        if not isinstance(path, str):
            return None
        split = given.get("split")
        config = config if isinstance(config, str) else None
        rows = DatasetCall(node, path, config, given.get("data_files"), None)
        if isinstance(split, list | tuple) and all(isinstance(each, str) for each in split):
            return replace(rows, parts=tuple(split))
        return self._split(rows, split) if isinstance(split, str) else rows

    def _split(self, rows: DatasetCall, split: str) -> DatasetCall:
        """Return `rows` of a split. split: "train", or a slice or sum, such as "train[:1000]"."""
        name, bracket, rest = split.partition("[")
        first = re.fullmatch(r":(\d{1,9})\]", rest)
        if first is not None and int(first[1]):
            return replace(rows, split=name, first=int(first[1]))
        if bracket or "+" in split:
            return replace(rows, split=name.partition("+")[0], part=split, calls=(*rows.calls, rows.load))
        return replace(rows, split=split)
