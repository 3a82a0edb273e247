"""lm-evaluation-harness (EleutherAI, `lm_eval`): its tasks and results, with a loaded model as the backend.

Requests become the same token ids, windows and stop strings as in its own `hf` backend. Log-probabilities are
thus the same up to the rounding of sums. Greedy completions are too if generation_config.json states nothing
but end tokens: transformers' generate applies all of that file, jaxft reads its end tokens. Unlike that
backend, jaxft leaves an end token that is not special out of a completion's text.
lm_eval is an extra and is imported inside functions only.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from jaxft.annotations import Seed, at_least, check_bounds
from jaxft.batch import Tokens
from jaxft.data.chat.template import REJECTIONS, render_messages, template_of
from jaxft.data.progress import RowProgress
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.rows.example import Message
from jaxft.distributed import sharding
from jaxft.engine.sampling import BUCKET, Sampling, without_stop
from jaxft.nn.attention.kv_cache import CacheFormat
from jaxft.nn.tree import Params, nearest
from jaxft.objectives.read_positions import read_logps
from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.train.evaluate.completer import Completer
from jaxft.weights.hf import hub
from jaxft.weights.hf.safetensors import read_model_json
from jaxft.weights.pretrained import check_token_id

Continuation = tuple[Sequence[int], Sequence[int]]  # token ids of a context, at least one, and those after it
FEW_READS = 32  # positions with logits in rows with short continuations, such as choices
MAX_NEW = 256  # tokens of a completion where the task does not say, as in the hf backend
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of this limit
# Arguments of generation that jaxft does not have, with the value that changes nothing
NO_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "use_cache": True}
# Settings of generation_config.json that change greedy completions of the hf backend, but not of jaxft
UNREAD = (
    "repetition_penalty", "no_repeat_ngram_size", "num_beams", "min_length", "min_new_tokens",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "guidance_scale",
)  # fmt: skip


@dataclass(frozen=True)
class TaskEvaluation:
    """Options of an evaluation on tasks of lm-evaluation-harness."""

    tasks: str
    include_path: str | None = None
    num_fewshot: Annotated[int | None, at_least(0)] = None
    limit: Annotated[int | None, at_least(1)] = None
    max_length: Annotated[int | None, at_least(1)] = None
    chat: bool = False
    system_instruction: str | None = None
    gen_kwargs: str = ""
    unsafe_code: bool = False
    seed: Seed = 0
    kv_cache: CacheFormat = "compute"

    def __post_init__(self):
        check_bounds(self)
        if not self.names:
            raise ValueError("--tasks names no task; use names such as arc_easy,mmlu")
        self.generation()

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def generation(self) -> dict[str, Any]:
        """Return gen_kwargs by name. Values are parsed as JSON; other text is a string."""
        values: dict[str, Any] = {}
        for item in filter(None, (item.strip() for item in self.gen_kwargs.split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not (equals and value and name.isidentifier()):
                raise ValueError(f"--gen-kwargs {item}: expected name=value, such as max_gen_toks=64")
            try:
                values[name] = json.loads(value.lower() if value in ("True", "False") else value)
            except ValueError:
                values[name] = value
        return values


class _Generation(NamedTuple):
    """Arguments of a generate_until request. stops: strings that end a completion."""

    sampling: Sampling
    stops: tuple[str, ...]


def generation_settings(given: dict[str, Any], end: str) -> _Generation:
    """Return the settings of a generate_until request of a task. given: its arguments. end: text of the end
    token, which ends a completion too.

    Raises ValueError for arguments that jaxft does not have.
    """
    until = given.get("until") or []
    stops = (*([until] if isinstance(until, str) else until), end)
    new = next((int(given[name]) for name in LIMITS if given.get(name) is not None), MAX_NEW)
    is_sampled, temperature = given.get("do_sample"), float(given.get("temperature") or 0)
    top_k, top_p, min_p = (given.get(name) for name in ("top_k", "top_p", "min_p"))
    read = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *LIMITS)
    for name, value in given.items():
        if name not in read and (name not in NO_EFFECT or value != NO_EFFECT[name]):
            remedy = f", or use --gen-kwargs {name}={NO_EFFECT[name]}" if name in NO_EFFECT else ""
            raise ValueError(
                f"the generation argument {name}={value} of a task is not supported; remove it from the "
                f"task's generation_kwargs or from --gen-kwargs{remedy}"
            )
    sampling = Sampling(new)
    if is_sampled and not temperature:
        raise ValueError(
            f"a task generates with do_sample=True and temperature={given.get('temperature')!r}; use "
            "--gen-kwargs do_sample=true,temperature=1.0 to sample, or do_sample=false for greedy completions"
        )
    if temperature and is_sampled is not False:
        sampling = Sampling(new, temperature, top_k or None, top_p, min_p)
    return _Generation(sampling, tuple(dict.fromkeys(stop for stop in stops if stop)))


def generation_config_notes(ref: str) -> list[str]:
    """Return a warning if the generation_config.json of a model has penalties, which change the completions
    of the hf backend, else [].
    """
    located = hub.locate(ref, config_only=True)
    path = located.path / "generation_config.json"
    if located.kind != "folder" or not path.is_file():
        return []
    given = {name: value for name, value in read_model_json(path).items() if name in UNREAD}
    penalties = [f"{name}={value}" for name, value in given.items() if value not in (None, 0, 1, [], {})]
    if not penalties:
        return []
    return [
        f"warning: {path} has {', '.join(penalties)[:300]}, which jaxft does not apply; the hf backend of "
        "lm-evaluation-harness does, so its scores of tasks that generate text may differ"
    ]


class HarnessBackend:
    """The loaded model with its compiled programs, as lm-evaluation-harness uses it. batch: rows that are
    computed together. template: how the chat template renders prompts, with way.chat.

    Raises ValueError for a length beyond the model's, a tokenizer without BOS and EOS, or chat=True without a
    chat template.
    """

    def __init__(
        self,
        loaded: LoadedWeights,
        way: TaskEvaluation,
        batch: int = 8,
        template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
    ):
        limit, tokenizer = loaded.model.config.max_positions, loaded.tokenizer
        self.loaded, self.way, self.tokenizer, self.batch = loaded, way, tokenizer, batch
        self.length = way.max_length or limit
        if self.length > limit:
            raise ValueError(f"--max-length {self.length} exceeds the model's {limit} positions; lower it")
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError(
                "the model's tokenizer has no BOS or EOS token, with which texts begin; use another model"
            )
        self.prefix = eos if bos is None else bos  # before a text without a context
        self.end = bos if eos is None else eos
        self.template = template_of(tokenizer, template)
        if way.chat and self.template is None:
            raise ValueError("--chat: the model's tokenizer has no chat template; omit --chat")
        self.scorer = TokenScorer(loaded, batch, self.length)
        self.completer = Completer(batch, way.seed, way.kv_cache)
        self.truncated, self.without_system = 0, 0

    def notes(self) -> list[str]:
        """Return lines about requests that were changed, such as truncated contexts."""
        changes = {
            f"{_are(self.truncated, 'request')} longer than the {self.length} tokens that the model reads; "
            "the start of the context is left out": self.truncated,
            f"{_are(self.without_system, 'prompt')} without the system message, which the chat template "
            "rejects": self.without_system,
        }
        return [line for line, count in changes.items() if count]

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Return token ids. special: whether to add special tokens such as BOS; None adds them unless the
        text begins with the text of BOS.
        """
        if special is None:
            special = not text.startswith(self.tokenizer.decode([self.prefix]))
        return self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def logps(self, continuations: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """Return the score of each continuation, see TokenScorer.scores."""
        self.truncated += sum(len(context) + len(x) > self.length + 1 for context, x in continuations)
        return self.scorer.scores(continuations)

    def check_generation(self, given: dict[str, Any]) -> None:
        """Raise ValueError for arguments of generation that jaxft lacks, or more tokens than a row has."""
        self._longest_context(generation_settings(given, "").sampling.max_new)

    def _longest_context(self, new: int) -> int:
        """Return how many tokens of a context fit if `new` tokens follow. Raises ValueError if none do."""
        if new >= self.length:
            raise ValueError(
                f"a task generates up to {new} tokens, and the model reads {self.length}; generate fewer, "
                "for example with --gen-kwargs max_gen_toks=64"
            )
        return self.length - new

    def completions(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Return the completion of each (context, generate_until arguments), up to a stop string."""
        end = self.tokenizer.decode([self.end])
        of_settings: dict[_Generation, list[int]] = {}
        for number, (_, given) in enumerate(requests):
            of_settings.setdefault(generation_settings(given, end), []).append(number)
        completed = [""] * len(requests)
        for generation, numbers in of_settings.items():
            texts = self._complete([requests[number][0] for number in numbers], generation)
            for number, text in zip(numbers, texts, strict=True):
                completed[number] = text
        return completed

    def _complete(self, contexts: Sequence[str], generation: _Generation) -> list[str]:
        loaded, longest = self.loaded, self._longest_context(generation.sampling.max_new)
        encoded = [self.encode(context) or [self.prefix] for context in contexts]
        self.truncated += sum(len(ids) > longest for ids in encoded)
        names = [f"after {context[-60:]!r}" for context in contexts]
        prompts = [(name, ids[-longest:]) for name, ids in zip(names, encoded, strict=True)]

        def is_enough(tokens: list[int]) -> bool:
            text = self._text(tokens)
            return any(stop in text for stop in generation.stops)

        completed = []
        for row in self.completer.complete(loaded, prompts, generation.sampling, is_enough=is_enough)[:, 0]:
            text = self._text(without_stop(row[row >= 0], loaded.stop))
            for stop in generation.stops:  # truncated at each in turn, as in the hf backend
                text = text.partition(stop)[0]
            completed.append(text)
        return completed

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def chat_text(self, messages: list[Message], generation: bool) -> str:
        """Return a conversation as the chat template renders it. generation: with the generation prompt; else
        the text ends within the last message, which the model continues.

        A system message that the template rejects is left out, as by the hf backend, and counted in
        without_system. Raises ValueError without a chat template, and for other messages that it rejects.
        """
        assert self.template is not None  # with --chat, __init__ requires it
        try:
            text = render_messages(self.template, messages, None, generation)
        except REJECTIONS as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise ValueError(
                    f"{self.template.name} rejects the messages of a task: {error}; omit --chat"
                ) from error
            self.without_system += 1
            return self.chat_text(others, generation)
        if generation:
            return text
        last = str(messages[-1]["content"])
        at = text.rindex(last.strip())
        is_complete = text.startswith(last.lstrip(), at)  # with the white space at its end
        return text[: at + len(last.lstrip() if is_complete else last.strip())]


def _are(count: int, noun: str) -> str:
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def make_harness_model(backend: HarnessBackend) -> Any:
    """Return an lm_eval.api.model.TemplateLM that delegates to the backend."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):
        """The backend as lm_eval calls it; names and parameters of the methods are lm_eval's."""

        tokenizer = backend.tokenizer
        tokenizer_name = str(backend.tokenizer.name_or_path).replace("/", "__")
        max_length, max_gen_toks = backend.length, MAX_NEW
        eot_token_id, prefix_token_id = backend.end, backend.prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return backend.encode(string, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return backend.logps([(context, tokens) for _, context, tokens in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = [
                [
                    make_disjoint_window(window)
                    for window in get_rolling_token_windows(
                        backend.encode(request.args[0]), backend.prefix, backend.length, 1
                    )
                ]
                for request in requests
            ]
            logps = iter(
                [logp for logp, _ in backend.logps([window for pieces in windows for window in pieces])]
            )
            return [sum(next(logps) for _ in pieces) for pieces in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return backend.completions([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return backend.chat_text(chat_history, add_generation_prompt)

    return HarnessModel()


class _Read(NamedTuple):
    """The log-probability to compute of `target` after the token at `position`, for continuation `number`."""

    position: int
    target: int
    number: int


class _ScoredRow(NamedTuple):
    """Token ids, and the log-probs to compute. Continuations that differ only in the last token share one."""

    ids: tuple[int, ...]
    reads: list[_Read]


class TokenScorer:
    """Scores continuations by one model. Programs are compiled for rows of 64, 128, 256, ... tokens.

    batch: rows that are computed together. length: the most tokens that the model reads; of a longer context
    the first tokens are left out.
    """

    def __init__(self, loaded: LoadedWeights, batch: int, length: int):
        self.loaded, self.batch, self.length = loaded, batch, length
        model = loaded.model

        def forward(params: Params, batch: Tokens) -> tuple[jax.Array, jax.Array]:
            rows: Any = jax.tree.map(lambda x: x[0], batch)
            h, _ = model.hidden(params, rows)
            read_values = read_logps(model, params, h, (rows.read, rows.targets))
            return read_values.logp, read_values.top1

        self.forward = jax.jit(forward)  # compiled for each shape of a batch

    def scores(self, continuations: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether every token is the model's most likely one) for each
        continuation, and print progress while it takes long.

        Raises ValueError for a continuation without tokens or with more than `length`, for a token that the
        model does not have, and for log-probabilities that are not finite.
        """
        rows = rows_of(continuations, self.length)
        largest = max((max(row.ids) for row in rows), default=0)
        largest = max(largest, max((read.target for row in rows for read in row.reads), default=0))
        check_token_id("the model", largest, self.loaded.model.config.vocab)
        logps, greedy = [0.0] * len(continuations), [True] * len(continuations)
        with RowProgress("scoring", len(rows), enabled=True) as progress:
            for shape, part in batches_of(rows, self.batch, self.length):
                logp, top1 = jax.device_get(self.forward(self.loaded.params, self._placed(part, shape)))
                for own_logps, own_top1, row in zip(logp, top1, part):  # the last rows are padding
                    for x, is_top, read in zip(own_logps, own_top1, row.reads):
                        logps[read.number] += float(x)
                        greedy[read.number] &= bool(is_top)
                progress.add(len(part))
        for logp, (context, tokens) in zip(logps, continuations, strict=True):
            if not math.isfinite(logp):
                text = self.loaded.tokenizer.decode([*context, *tokens][-20:])
                remedy = "use --dtype float32, or check the weights"
                raise ValueError(f"the log-probability of a text that ends in {text!r} is {logp}; {remedy}")
        return list(zip(logps, greedy, strict=True))

    def _placed(self, rows: Sequence[_ScoredRow], shape: tuple[int, int]) -> Tokens:
        """Return padded rows as a batch on the mesh. shape: (tokens, positions with logits) of a row."""
        shards = sharding.row_shards(self.loaded.mesh)
        count, (length, reads) = -(-self.batch // shards) * shards, shape
        ids, segments = (np.zeros((1, count, length), np.int32) for _ in range(2))
        read, targets = (np.zeros((1, count, reads), np.int32) for _ in range(2))
        for i, row in enumerate(rows):
            ids[0, i, : len(row.ids)], segments[0, i, : len(row.ids)] = row.ids, 1
            read[0, i, : len(row.reads)] = [x.position for x in row.reads]
            targets[0, i, : len(row.reads)] = [x.target for x in row.reads]
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape) * segments
        weights = np.zeros(read.shape, np.float32)
        return sharding.shard_batch(
            self.loaded.mesh, Tokens(ids, segments, positions, read, targets, weights, packed=False)
        )


def rows_of(continuations: Sequence[Continuation], length: int) -> list[_ScoredRow]:
    """Return the rows in which `continuations` are scored. length: the most tokens of a row. Raises
    ValueError for an empty context or continuation, and for a continuation of more than `length` tokens.
    """
    by_ids: dict[tuple[int, ...], _ScoredRow] = {}
    rows = []
    for number, (context, tokens) in enumerate(continuations):
        if not tokens or not context:
            raise ValueError(
                f"continuation {number + 1} has no {'context ' if tokens else ''}tokens; check that the "
                "task's contexts and choices are not empty"
            )
        if len(tokens) > length:
            raise ValueError(
                f"continuation {number + 1} has {len(tokens)} tokens, more than the {length} that the model "
                "reads; use a larger --max-length, or leave out this task"
            )
        ids = tuple([*context, *tokens][-(length + 1) : -1])
        first = len(ids) - len(tokens)
        reads = [_Read(first + i, token, number) for i, token in enumerate(tokens)]
        row = by_ids.get(ids)
        if row is None or len(row.reads) + len(reads) > length_bucket(len(ids), length):
            row = by_ids[ids] = _ScoredRow(ids, [])
            rows.append(row)
        row.reads.extend(reads)
    return rows


def length_bucket(count: int, length: int) -> int:
    """Return the padded size of a row of `count` tokens: 64 times a power of two, but at most `length`
    rounded up to a multiple of 64.
    """
    size = BUCKET
    while size < count:
        size *= 2
    return min(size, -(-length // BUCKET) * BUCKET)


def batches_of(
    rows: Sequence[_ScoredRow], batch: int, length: int
) -> list[tuple[tuple[int, int], list[_ScoredRow]]]:
    """Return (shape, at most `batch` rows) for each batch, the longest rows first, so that a lack of memory
    shows at once. shape: (tokens, positions with logits) of a padded row. length: the most tokens of a row.
    """
    of_shape: dict[tuple[int, int], list[_ScoredRow]] = {}
    for row in rows:
        size = length_bucket(len(row.ids), length)
        reads = FEW_READS if len(row.reads) <= FEW_READS else size
        of_shape.setdefault((size, reads), []).append(row)
    return [
        (shape, rows_of_shape[i : i + batch])
        for shape, rows_of_shape in sorted(of_shape.items(), key=lambda item: item[0], reverse=True)
        for i in range(0, len(rows_of_shape), batch)
    ]


class HarnessResult(NamedTuple):
    """The results of tasks of lm-evaluation-harness.

    metrics: by "task/metric". table: lm-evaluation-harness's own. report: its results as a JSON object, with
    the responses to each row under "samples". notes: lines for the user. values: empty, unlike Evaluated's;
    the table has standard errors.
    """

    metrics: dict[str, float]
    table: str
    report: dict[str, Any]
    notes: list[str]
    values: Mapping[str, Sequence[float]] = {}


def require_harness() -> None:
    """Raise ImportError with what to install, if the extra `lm-eval` is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error}; install what --tasks needs: pip install 'jaxft[lm-eval]' (from a clone: pip install "
            "-e '.[lm-eval]')"
        ) from error


def load_tasks(names: Sequence[str], folder: str | None = None) -> list[Any]:
    """Return tasks and groups with their rows. names: tasks of lm-evaluation-harness, patterns such as
    "arc_*", or YAML files. folder: where further tasks are.

    Raises ValueError for an unknown name, and for a task whose configuration or rows cannot be read.
    """
    from lm_eval.tasks import TaskManager

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    # Its own tasks are thousands of files, which take seconds to list.
    manager = TaskManager(include_path=folder, include_defaults=len(files) < len(names))
    loaded_tasks: list[Any] = []
    for name in names:
        is_file = name in files
        if is_file and not Path(name).is_file():
            raise ValueError(f"--tasks {name}: no such file (relative to {Path.cwd()}); correct the path")
        matching = [name] if is_file else manager.match_tasks([name])
        if not matching:
            near = ", ".join(nearest(name, manager.all_tasks, 3)) or "none"
            raise ValueError(
                f"--tasks {name}: no such task; near: {near}. Tasks of your own are in the folder of "
                "--include-path, or a .yaml file"
            )
        for match in matching:
            try:
                loaded = manager.load([match])
            except Exception as error:  # files, data and code of others
                problem = f"{type(error).__name__}: {error}"
                text = f"--tasks {match}: the task cannot be loaded: {problem}; correct it, or leave it out"
                raise ValueError(text) from error
            groups = list(loaded.get("groups", {}).values())  # the first one contains the others
            loaded_tasks += groups[:1] or list(loaded["tasks"].values())
    return loaded_tasks


def evaluate_tasks(backend: HarnessBackend, tasks: Sequence[Any], about: dict[str, Any]) -> HarnessResult:
    """Evaluate a model on tasks from load_tasks. about: facts about the model, for the report.

    Raises ValueError for requests that the model cannot read or generate.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    way, generation = backend.way, backend.way.generation()
    for item in tasks:
        for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
            if task.get_config("output_type") == "generate_until":  # refused before the hours of other tasks
                backend.check_generation({**(task.get_config("generation_kwargs") or {}), **generation})
    report = simple_evaluate(
        make_harness_model(backend), tasks=list(tasks), num_fewshot=way.num_fewshot, limit=way.limit,
        batch_size=backend.batch, system_instruction=way.system_instruction, apply_chat_template=way.chat,
        gen_kwargs=generation or None, confirm_run_unsafe_code=way.unsafe_code,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    kinds = ["results", *(["groups"] if report.get("groups") else [])]
    table = "\n".join(make_table(report, kind) for kind in kinds)
    report["config"] |= {"model": "jaxft", "model_args": about}
    plain = json.loads(json.dumps(report, default=handle_non_serializable))
    return HarnessResult(task_metrics(plain), table, plain, backend.notes())


def task_metrics(report: dict[str, Any]) -> dict[str, float]:
    """Return a report's values as {"task/metric": value}, or "task/metric,filter" with a filter."""
    metrics = {}
    for task, values in report["results"].items():
        for name, value in values.items():
            metric, _, filter = name.partition(",")
            if filter and isinstance(value, int | float):
                metrics[f"{task}/{metric}" + ("" if filter == "none" else f",{filter}")] = value
    return metrics


def write_results(result: HarnessResult, path: Path) -> None:
    """Write the report as JSON, and in its folder the responses to each task's rows, as
    samples_TASK_NAME.jsonl. The formats are lm-evaluation-harness's own.
    """
    report = {name: value for name, value in result.report.items() if name != "samples"}
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for task, rows in result.report.get("samples", {}).items():
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in task)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.with_name(f"samples_{plain}_{path.stem}.jsonl").write_text(lines, "utf-8")
