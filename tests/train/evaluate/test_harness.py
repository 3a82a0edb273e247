"""lm-evaluation-harness on a model of jaxft: the scores are those of its own hf backend."""

import json
import sys

import jax
import numpy as np
import pytest
import tiny_llama
from evaluate_place import write
from scripts_in_process import call, load

from jaxft.distributed import sharding
from jaxft.engine.sampling import Sampling
from jaxft.runs.loaded_weights import load_each, named_weights
from jaxft.train.evaluate.harness import (
    HarnessBackend,
    HarnessResult,
    TaskEvaluation,
    TokenScorer,
    batches_of,
    generation_config_notes,
    generation_settings,
    rows_of,
)

torch = pytest.importorskip("torch")
LENGTH = 80  # tokens that the models read
CHOICES = [
    ("The rank is", ["small", "large and wide", "none of these", "a"], 0),
    ("Two and two are", ["five", "four"], 1),
    ("x" * 90, ["yes", "no", "perhaps"], 2),
    ("Is it?", ["no", "yes"], 0),
    ("A long question about chairs", ["red chairs", "12", "red chair"], 1),
    ("What follows? ", ["a", "b", "c", "d"], 3),
]
LONG = " ".join(f"part {i} of more than one window," for i in range(9))
TEXTS = ["short", "y" * 79 + " and so on", LONG, "1\n2\n3", "z" * 80]
TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "target_delimiter": " ",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True}
                        for name in ("acc", "acc_norm")],
    },
    "windows": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["STOP", "q"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder of a model, rows and tasks, and the model by transformers."""
    folder = tmp_path_factory.mktemp("harness")
    model = tiny_llama.tiny_torch()
    tiny_llama.write_folder(folder / "model", model)
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in CHOICES]
    write(folder / "rows.jsonl", rows)
    write(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    for name, task in TASKS.items():
        file = folder / ("texts.jsonl" if name == "windows" else "rows.jsonl")
        shared = {"task": f"tiny_{name}", "dataset_path": "json", "test_split": "test"}
        shared |= {"dataset_kwargs": {"data_files": {"test": str(file)}}}
        (folder / f"{name}.yaml").write_text(json.dumps({**shared, **task}))  # JSON is YAML
    return folder, model


@pytest.fixture
def evaluate(place, tmp_path, monkeypatch, capsys):
    """Run the command on the model in float32; return (code, stdout, stderr)."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(place[0])

    def run(*argv):
        shared = ("--dtype", "float32", "--max-length", str(LENGTH), "--batch", "4")
        return call(monkeypatch, capsys, "evaluate", "--model", "model", *shared, *argv)

    return run


def by_hf_backend(model, tasks, **options):
    """The results of lm-evaluation-harness's own backend, and its tables."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    backend = HFLM(
        pretrained=model,
        tokenizer=tiny_llama.tiny_tokenizer(),
        batch_size=4,
        max_length=LENGTH,
        backend="causal",
    )
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(backend, tasks=tasks, task_manager=manager, **options)
    return found, make_table(found)


def responses(samples):
    """What a model responded to each request: (log-probability, is greedy), or text."""
    found = []
    for task in sorted(samples):
        for row in sorted(samples[task], key=lambda row: row["doc_id"]):
            found += [response[0] for response in row["resps"]]
    return found


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        if isinstance(other, str):
            assert own == other
        elif isinstance(other, float):
            assert own == pytest.approx(other, rel=2e-6)
        else:
            assert own[0] == pytest.approx(other[0], rel=2e-6) and bool(own[1]) == bool(other[1])


def assert_same_tables(ours, theirs):
    """All cells are the same. A perplexity is shown with more digits than float32 has, so that the last one
    depends on the CPU: numbers are compared as those of the results are.
    """
    for own, other in zip(ours.split("|"), theirs.split("|"), strict=True):
        try:
            assert float(own) == pytest.approx(float(other), rel=2e-6)
        except ValueError:
            assert own == other


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_scores_are_those_of_the_hf_backend_to_the_digit(place, evaluate, tmp_path, chat):
    names = [f"{name}.yaml" for name in TASKS if not (chat and name == "windows")]
    options, argv = {}, []
    if chat:
        options = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 1}
        argv = ["--chat", "--system-instruction", "Be brief.", "--num-fewshot", "1"]
    out = tmp_path / "results.json"
    code, table, err = evaluate("--tasks", ",".join(names), "--out", str(out), *argv)
    assert code == 0, err
    theirs, their_table = by_hf_backend(place[1], names, **options)
    assert_same_tables(table.strip(), their_table.strip())
    assert "tiny_written" in table
    report = json.loads(out.read_text())
    assert report["results"].keys() == theirs["results"].keys()
    for task, values in theirs["results"].items():
        for name, value in values.items():
            own = report["results"][task][name]
            assert own == value if isinstance(value, str) else own == pytest.approx(value, rel=2e-6)
    ours = {}
    for file in tmp_path.glob("samples_*.jsonl"):
        task = next(task for task in theirs["samples"] if task in file.name)
        ours[task] = [json.loads(line) for line in file.read_text().splitlines()]
    assert ours.keys() == theirs["samples"].keys()
    assert_same(responses(ours), responses(theirs["samples"]))
    texts = [text for text in responses(theirs["samples"]) if isinstance(text, str)]
    assert len(set(texts)) > 2 and "longer than the 80 tokens" in err


def test_a_run_keeps_the_results_and_those_of_several_adapters_are_separate(tmp_path, capsys):
    script = load("evaluate")
    report = {"results": {"t": {"acc,none": 0.5}}, "samples": {"a/b": [{"doc_id": 0}, {"doc_id": 1}]}}
    one = HarnessResult({"t/acc": 0.5}, "table", report, [])
    script.write_tasks(None, str(tmp_path), {"": one})
    (results,) = (tmp_path / "lm_eval").glob("results_*.json")
    (samples,) = (tmp_path / "lm_eval").glob("samples_a_b_results_*.jsonl")
    assert json.loads(results.read_text()) == {"results": report["results"]}
    assert [json.loads(line) for line in samples.read_text().splitlines()] == report["samples"]["a/b"]
    script.write_tasks(tmp_path / "x.json", None, {"a": one, "b": one})
    names = {path.name for path in tmp_path.iterdir()} - {"lm_eval"}
    assert names == {"x_a.json", "x_b.json", "samples_a_b_x_a.jsonl", "samples_a_b_x_b.jsonl"}
    script.write_tasks(None, None, {"": one})
    assert capsys.readouterr().err.count("wrote ") == 3


def test_the_metrics_are_one_json_object(place, evaluate):
    code, out, err = evaluate("--tasks", "choice.yaml", "--limit", "2", "--json", "--num-fewshot", "0")
    assert code == 0, err
    found = json.loads(out)
    assert {"tiny_choice/acc", "tiny_choice/acc_norm"} <= found.keys() and 0 <= found["tiny_choice/acc"] <= 1


def test_completions_end_at_stop_strings_and_sampling_is_repeatable(place, evaluate, tmp_path):
    texts = []
    for number in range(2):
        out = tmp_path / f"{number}.json"
        sampled = "do_sample=true,temperature=1.0,max_gen_toks=20,until=e"
        code, _, err = evaluate(
            "--tasks", "written.yaml", "--gen-kwargs", sampled, "--seed", "3", "--out", str(out)
        )
        assert code == 0, err
        (file,) = tmp_path.glob(f"samples_*_{number}.jsonl")
        texts.append([json.loads(line)["resps"][0][0] for line in file.read_text().splitlines()])
    assert texts[0] == texts[1] and not any("e" in text for text in texts[0]) and len(set(texts[0])) > 3


SAD = [
    ("--tasks missing.yaml", "missing.yaml: no such file"),
    ("--tasks ,", "--tasks names no task"),
    ("--tasks choice.yaml --file rows.jsonl", "and scores of completions; remove it, or omit --tasks"),
    ("--tasks choice.yaml --by exact", "--tasks have their own scores"),
    ("--tasks choice.yaml --gen-kwargs x", "--gen-kwargs x: expected name=value"),
    ("--tasks choice.yaml --num-fewshot -1", "--num-fewshot: expected at least 0"),
    ("--tasks choice.yaml --max-length 999", "--max-length 999 exceeds the model's 256 positions"),
    ("--tasks choice.yaml,written.yaml --gen-kwargs max_gen_toks=80", "a task generates up to 80 tokens"),
    ("--tasks choice.yaml,written.yaml --gen-kwargs num_beams=4", "num_beams=4 of a task is not supported"),
    ("--tasks broken.yaml", "--tasks broken.yaml: the task cannot be loaded"),
    ("--tasks gone.yaml", "--tasks gone.yaml: the task cannot be loaded"),
]


@pytest.mark.parametrize(("argv", "text"), SAD, ids=[argv for argv, _ in SAD])
def test_what_cannot_be_evaluated_as_a_task_is_one_line(place, evaluate, argv, text, monkeypatch):
    monkeypatch.setattr(HarnessBackend, "logps", None)  # refused before any request
    (place[0] / "broken.yaml").write_text("task: [")
    task = json.loads((place[0] / "choice.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = "gone.jsonl"
    (place[0] / "gone.yaml").write_text(json.dumps(task))
    code, out, err = evaluate(*argv.split())
    assert code in (1, 2) and not out
    *_, line = err.splitlines()
    assert line.startswith("error: ") and text in line, err


def test_without_lm_eval_a_line_names_the_extra(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = call(monkeypatch, capsys, "evaluate", "--model", str(place[0] / "model"), "--tasks", "x")
    assert code == 1 and not out and err.count("\n") == 1 and "pip install 'jaxft[lm-eval]'" in err


def test_continuations_with_the_same_input_share_a_row_and_shapes_are_few():
    same = [([1, 2, 3], [n]) for n in range(40)]
    others = [([5] * n, [7, 8]) for n in (1, 63, 64, 200, 400)]
    rows = rows_of([*same, *others], 300)
    assert [len(row.reads) for row in rows] == [40, 2, 2, 2, 2, 2]
    assert rows[-1].ids == (5,) * 299 + (7,) and [read.position for read in rows[-1].reads] == [298, 299]
    shapes = [shape for shape, _ in batches_of(rows, 2, 300)]
    assert shapes == [(320, 32), (256, 32), (128, 32), (64, 64), (64, 32)]
    many = rows_of([([1], [n]) for n in range(100)], 300)
    assert [len(row.reads) for row in many] == [64, 36]
    assert sorted(read.number for row in many for read in row.reads) == list(range(100))


@pytest.fixture
def loaded(place):
    """The model in float32 on a mesh, which is set."""
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        yield load_each({"": named_weights(None, str(place[0] / "model"), None)}, mesh, "float32")[""]


def test_log_probabilities_are_those_of_transformers(place, loaded):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 256, m).tolist(), rng.integers(0, 256, n).tolist())
        for m, n in ((1, 1), (3, 2), (70, 5), (5, 70), (64, 1), (200, 9))
    ]
    greedy = rng.integers(0, 256, 4).tolist()
    with torch.no_grad():
        pairs.append((greedy, [int(place[1](torch.tensor([greedy])).logits[0, -1].argmax())]))
    scorer = TokenScorer(loaded, 2, 100)
    found = scorer.scores(pairs)
    for (context, tokens), (logp, greedy) in zip(pairs, found, strict=True):
        ids = [*context, *tokens][-101:]
        with torch.no_grad():
            logps = place[1](torch.tensor([ids[:-1]])).logits.log_softmax(-1)[0, -len(tokens) :]
        expected = sum(float(row[token]) for row, token in zip(logps, tokens, strict=True))
        assert logp == pytest.approx(expected, rel=1e-5)
        assert greedy == all(int(row.argmax()) == t for row, t in zip(logps, tokens, strict=True))
    assert [greedy for _, greedy in found] == [False] * 6 + [True]
    for wrong, message in (
        (([1], []), "has no tokens"),
        (([], [1]), "has no context tokens"),
        (([1], [1] * 101), "101 tokens, more than the 100"),
        (([1], [400]), "token id 400"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.scores([wrong])


@pytest.mark.slow
def test_completions_are_transformers_up_to_the_first_stop_string(place, loaded):
    backend, tokenizer = HarnessBackend(loaded, TaskEvaluation("x", max_length=LENGTH), 3), loaded.tokenizer
    contexts = ["The rank is", "0123456789" * 9, "12", "", "Is it?"]
    complete, tokens = [], []
    for context in contexts:
        ids = (tokenizer(context).input_ids or [256])[-(LENGTH - 24) :]
        with torch.no_grad():
            new = place[1].generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=257)
        tokens.append(new[0, len(ids) :].tolist())
        complete.append(tokenizer.decode(tokens[-1], skip_special_tokens=True))
    given = {"max_gen_toks": 24, "until": []}
    assert backend.completions([(context, given) for context in contexts]) == complete
    stop = complete[0][3:5]
    expected = [text.partition(stop)[0] for text in complete]
    assert 0 < len(expected[0]) < len(complete[0])
    assert backend.completions([(context, {**given, "until": stop}) for context in contexts]) == expected
    assert "2 requests are longer than the 80 tokens" in backend.notes()[0]  # one of each call
    end = next(token for token in tokens[0][1:] if token != tokens[0][0])  # ends turns
    ended = HarnessBackend(loaded._replace(stop=(end,)), TaskEvaluation("x", max_length=LENGTH), 3)
    expected = tokenizer.decode(tokens[0][: tokens[0].index(end)], skip_special_tokens=True)
    assert ended.completions([(contexts[0], given)]) == [expected] != [""]


def test_penalties_of_the_model_are_a_warning_and_arguments_are_checked_before_requests(loaded, tmp_path):
    backend = HarnessBackend(loaded, TaskEvaluation("x", max_length=LENGTH))
    backend.check_generation({"max_gen_toks": LENGTH - 1, "num_beams": 1})
    for given, message in (({"max_gen_toks": LENGTH}, "up to 80 tokens"), ({"num_beams": 4}, "num_beams=4")):
        with pytest.raises(ValueError, match=message):
            backend.check_generation(given)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 2, "repetition_penalty": 1.0, "temperature": 0.6}')
    assert generation_config_notes(str(tmp_path)) == []
    file.write_text('{"repetition_penalty": 1.1, "no_repeat_ngram_size": 3}')
    (note,) = generation_config_notes(str(tmp_path))
    assert "repetition_penalty=1.1, no_repeat_ngram_size=3" in note and note.startswith("warning: ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (Sampling(256), ("</s>",))),
        ({"until": "x", "max_new_tokens": 3, "do_sample": False, "temperature": 1},
         (Sampling(3), ("x", "</s>"))),
        ({"until": ["", "x", "x"], "temperature": 0.5, "top_k": 0}, (Sampling(256, 0.5), ("x", "</s>"))),
        ({"do_sample": True, "temperature": 1, "top_p": 0.9, "max_tokens": 2, "max_gen_toks": 4,
          "num_beams": 1, "min_p": 0.1},
         (Sampling(4, 1.0, None, 0.9, 0.1), ("</s>",))),
    ],
)  # fmt: skip
def test_arguments_of_generation_are_those_of_the_harness(given, expected):
    assert generation_settings(given, "</s>") == expected


@pytest.mark.parametrize("given", [{"do_sample": True}, {"do_sample": True, "temperature": 0.0, "top_k": 5}])
def test_sampling_without_a_temperature_is_refused(given):
    with pytest.raises(ValueError, match="do_sample=True and temperature=(None|0.0); use --gen-kwargs"):
        generation_settings(given, "</s>")


def test_prompts_are_rendered_as_by_transformers(loaded):
    backend, tokenizer = HarnessBackend(loaded, TaskEvaluation("x", chat=True)), loaded.tokenizer
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": " yes "}]
    assert backend.chat_text(turns[:1], True) == tokenizer.apply_chat_template(turns[:1], tokenize=False)
    theirs = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
    assert backend.chat_text(turns, False) == theirs == "<s>one?</s><s> yes "
    assert backend.encode("<s>a") == [256, *backend.encode("a", False)] and backend.encode("a")[-1] != 257
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = strict + "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    backend = HarnessBackend(loaded, TaskEvaluation("x", chat=True))
    assert backend.chat_text([{"role": "system", "content": "s"}, *turns[:1]], True) == "one?;"
    assert "1 prompt is without the system message" in backend.notes()[0]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--chat: the model's tokenizer has no chat template"):
        HarnessBackend(loaded, TaskEvaluation("x", chat=True))
