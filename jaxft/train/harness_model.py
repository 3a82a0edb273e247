"""A loaded model as lm-evaluation-harness (EleutherAI, `lm_eval`) uses one: token ids, log-probabilities of
continuations, completions.

Requests become the same token ids, windows and stop strings as in its own `hf` backend, so log-probabilities
are the same up to the rounding of sums, and so are greedy completions of models whose generation_config.json
states nothing but end tokens: transformers' generate applies all of that file, jaxft reads its end tokens.
An end token that is not special is left out of a completion's text, where that backend leaves it in.
lm_eval is an extra and is imported inside functions only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxft.data.example import Message
from jaxft.data.template import REJECTIONS, render_messages, template_of
from jaxft.data.template_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.engine.sampling import Sampling, without_stop
from jaxft.nn.cache import CacheFormat
from jaxft.runs.loaded_weights import LoadedWeights
from jaxft.train.samples import Completer
from jaxft.train.token_scores import Continuation, make_token_scorer
from jaxft.weights import hub
from jaxft.weights.safetensors import read_model_json

MAX_NEW = 256  # tokens of a completion where the task does not say, as in the hf backend
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # its names
# Arguments of generation that jaxft does not have, with the value that changes nothing
NO_EFFECT = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "use_cache": True,
}
# Settings of generation_config.json that change greedy completions of the hf backend, and not those of jaxft
UNREAD = (
    "repetition_penalty", "no_repeat_ngram_size", "num_beams", "min_length", "min_new_tokens",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
    "exponential_decay_length_penalty", "guidance_scale",
)  # fmt: skip


@dataclass(frozen=True)
class HarnessSettings:
    """How a model responds to requests.

    length: the most tokens that the model reads, None for its positions. batch: rows that are computed
    together. seed: of sampling. cache: how keys and values are stored. chat: whether prompts are rendered
    with the chat template. template: how it renders them.
    """

    length: int | None = None
    batch: int = 8
    seed: int = 0
    cache: CacheFormat = "compute"
    chat: bool = False
    template: TemplateSettings = field(default=DEFAULT_TEMPLATE_SETTINGS)


class _Generation(NamedTuple):
    """Arguments of a generate_until request. stops: strings that end a completion."""

    sampling: Sampling
    stops: tuple[str, ...]


def generation_settings(given: dict[str, Any], end: str) -> _Generation:
    """Return the settings of a generate_until request. end: the text of the end token, which stops too.

    Raises ValueError for arguments that jaxft does not have.
    """
    rest, until = dict(given), given.get("until") or []
    stops = (*([until] if isinstance(until, str) else until), end)
    new = next((int(given[name]) for name in LIMITS if given.get(name) is not None), MAX_NEW)
    is_sampled, temperature = given.get("do_sample"), float(given.get("temperature") or 0)
    top_k, top_p, min_p = (given.get(name) for name in ("top_k", "top_p", "min_p"))
    for name in ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *LIMITS):
        rest.pop(name, None)
    for name, value in rest.items():
        if name not in NO_EFFECT or value != NO_EFFECT[name]:
            remedy = f", or use --gen-kwargs {name}={NO_EFFECT[name]}" if name in NO_EFFECT else ""
            raise ValueError(
                f"a task generates with {name}={value}, which jaxft does not have; leave it out{remedy}"
            )
    sampling = Sampling(new)
    if is_sampled and not temperature:
        raise ValueError(
            "a task generates with do_sample=True and temperature 0 or none; use --gen-kwargs "
            "do_sample=true,temperature=1.0 to sample, or do_sample=false for greedy completions"
        )
    if temperature and is_sampled is not False:
        sampling = Sampling(new, temperature, top_k or None, top_p, min_p)
    return _Generation(sampling, tuple(dict.fromkeys(stop for stop in stops if stop)))


def generation_config_notes(ref: str) -> list[str]:
    """Return a warning if the generation_config.json of a model has penalties, which change the completions
    of the hf backend.
    """
    located = hub.locate(ref, config_only=True)
    path = located.path / "generation_config.json"
    if located.kind != "folder" or not path.is_file():
        return []
    given = {name: value for name, value in read_model_json(path).items() if name in UNREAD}
    found = [f"{name}={value}" for name, value in given.items() if value not in (None, 0, 1, [], {})]
    if not found:
        return []
    return [
        f"warning: {path} has {', '.join(found)[:300]}, which jaxft does not apply; the hf backend of "
        "lm-evaluation-harness does, so its scores of tasks that generate text may differ"
    ]


def before_stops(text: str, stops: Sequence[str]) -> str:
    """Return the text before stop strings, which are removed one after the other, as the hf backend does."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


class HarnessBackend:
    """The loaded model with its compiled programs.

    Raises ValueError for a length that the model does not have, and for a tokenizer without BOS and EOS or,
    where it is needed, without a chat template.
    """

    def __init__(self, loaded: LoadedWeights, settings: HarnessSettings):
        limit, tokenizer = loaded.model.config.max_positions, loaded.tokenizer
        self.loaded, self.settings, self.tokenizer = loaded, settings, tokenizer
        self.length = settings.length or limit
        if self.length > limit:
            raise ValueError(
                f"--max-length {self.length} exceeds the model's {limit} positions; use at most {limit}"
            )
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError("the model's tokenizer has no BOS or EOS token, with which texts begin")
        self.prefix = eos if bos is None else bos  # before a text without a context
        self.end = bos if eos is None else eos
        self.template = template_of(tokenizer, settings.template)
        if settings.chat and self.template is None:
            raise ValueError("--chat: the model's tokenizer has no chat template; omit --chat")
        self.scorer = make_token_scorer(loaded, settings.batch, self.length)
        self.completer = Completer(settings.batch, settings.seed, settings.cache)
        self.truncated, self.without_system = 0, 0

    def notes(self) -> list[str]:
        """Return lines about requests that were changed."""
        found = []
        if self.truncated:
            found.append(
                f"{_are(self.truncated, 'request')} longer than the {self.length} tokens that the model "
                "reads; the start of the context is left out"
            )
        if self.without_system:
            found.append(
                f"{_are(self.without_system, 'prompt')} without the system message, which the chat template "
                "rejects"
            )
        return found

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Return token ids. special: whether with the tokenizer's special tokens, such as BOS; None is with
        them unless the text begins with BOS.
        """
        if special is None:
            special = not text.startswith(self.tokenizer.decode([self.prefix]))
        return self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def logps(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation of a context, and whether it is the greedy one."""
        self.truncated += sum(len(context) + len(tokens) > self.length + 1 for context, tokens in pairs)
        found = self.scorer.scores([Continuation(*pair) for pair in pairs])
        return [(score.logp, score.greedy) for score in found]

    def check_generation(self, given: dict[str, Any]) -> None:
        """Raise ValueError for arguments of generation that jaxft does not have, or for more tokens than the
        model reads.
        """
        self._longest_context(generation_settings(given, "").sampling.max_new)

    def _longest_context(self, new: int) -> int:
        """Return the most tokens of a context that leave positions for `new` tokens."""
        if new >= self.length:
            raise ValueError(
                f"a task generates up to {new} tokens, and the model reads {self.length}; generate fewer, "
                "for example with --gen-kwargs max_gen_toks=64"
            )
        return self.length - new

    def completions(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Return the completion of each context by its arguments of generation, up to a stop string."""
        end = self.tokenizer.decode([self.end])
        of_settings: dict[_Generation, list[int]] = {}
        for number, (_, given) in enumerate(requests):
            of_settings.setdefault(generation_settings(given, end), []).append(number)
        found = [""] * len(requests)
        for generation, numbers in of_settings.items():
            texts = self._complete([requests[number][0] for number in numbers], generation)
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found

    def _complete(self, contexts: Sequence[str], generation: _Generation) -> list[str]:
        loaded, longest = self.loaded, self._longest_context(generation.sampling.max_new)
        encoded = [self.encode(context) or [self.prefix] for context in contexts]
        self.truncated += sum(len(ids) > longest for ids in encoded)
        names = [f"after {context[-60:]!r}" for context in contexts]
        prompts = [(name, ids[-longest:]) for name, ids in zip(names, encoded, strict=True)]

        def is_enough(tokens: list[int]) -> bool:
            text = self._text(tokens)
            return any(stop in text for stop in generation.stops)

        sampled = self.completer.complete(loaded, prompts, generation.sampling, is_enough=is_enough)[:, 0]
        return [
            before_stops(self._text(without_stop(row[row >= 0], loaded.stop)), generation.stops)
            for row in sampled
        ]

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def chat_text(self, messages: list[Message], generation: bool) -> str:
        """Return a conversation as the chat template renders it. generation: with the generation prompt; else
        the text ends within the last message, which the model continues.

        A system message that the template rejects is left out, as by the hf backend. Raises ValueError for
        other messages that it rejects.
        """
        if self.template is None:
            raise ValueError("the model's tokenizer has no chat template; omit --chat")
        try:
            text = render_messages(self.template, messages, None, generation)
        except REJECTIONS as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise ValueError(f"{self.template.name} rejects the messages of a task: {error}") from error
            self.without_system += 1
            return self.chat_text(others, generation)
        if generation:
            return text
        last = str(messages[-1]["content"])
        at = text.rindex(last.strip())
        is_complete = text.startswith(last.lstrip(), at)  # with the white space at its end
        return text[: at + len(last.lstrip() if is_complete else last.strip())]


def _are(count: int, noun: str) -> str:
    """Return a count with its noun and verb: 1 request is, 2 requests are."""
    return f"{count} {noun} is" if count == 1 else f"{count} {noun}s are"


def make_harness_model(backend: HarnessBackend) -> Any:
    """Return an lm_eval.api.model.TemplateLM that delegates to the backend."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class HarnessModel(TemplateLM):
        """The names and parameters are lm_eval's."""

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
            logps = iter([logp for logp, _ in backend.logps([window for own in windows for window in own])])
            return [sum(next(logps) for _ in own) for own in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return backend.completions([request.args for request in requests])

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return backend.chat_text(chat_history, add_generation_prompt)

    return HarnessModel()
