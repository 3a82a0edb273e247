"""Ray: start one process of a run on each of several nodes of a Ray cluster.

    ray job submit --working-dir . -- python scripts/launch/ray_train.py NODES GPUS llama31_8b_sft \
        mesh.data=1 mesh.fsdp=-1 micro=1

GPUS is the number per node; arguments after it are for `jaxft train`. scripts/launch/rayjob.yaml starts
the script by KubeRay. Every node needs jaxft in Ray's environment. JAXFT_FOLDER names a folder for runs/ that
all nodes share, by default the working directory. The first node is the coordinator, and JAXFT_ variables set
the ranks.

If a process dies or stalls (exit codes 75, 134, 137, 143), or a node is lost, all are started again on the
nodes that Ray then has, at most JAXFT_RESTARTS times (default 20); the run resumes from its newest
checkpoint. Any other code is a user error and ends the job.
"""

import os
import socket
import subprocess
import sys
from typing import Any

RESTART_CODES = (75, 134, 137, 143)
TRAIN = [sys.executable, "-c", "from jaxft.cli.commands import main; raise SystemExit(main())", "train"]


def address() -> str:
    """Return HOST:PORT for the coordinator of jax.distributed: this node's IP address and a free port."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return f"{ray.util.get_node_ip_address()}:{port}"


def train(arguments: list[str], environ: dict[str, str]) -> int:
    """Run `jaxft train` on this node and return its exit code, 128 plus the number if a signal ended it."""
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    code = subprocess.run(
        [*TRAIN, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environ},
        cwd=os.environ.get("JAXFT_FOLDER"),
        check=False,
    ).returncode
    return 128 - code if code < 0 else code


def overall(codes: list[int]) -> int:
    """Return one exit code for all processes: a user error's if there is one, else another that is not 0."""
    errors = [code for code in codes if code not in (0, *RESTART_CODES)]
    return next(iter([*errors, *(code for code in codes if code)]), 0)


def attempt(ray: Any, nodes: int, gpus: int, arguments: list[str]) -> int:
    """Start the run once on `nodes` nodes, and return its exit code; 137 if a node is lost."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"GPU": gpus, "CPU": 1}] * nodes, strategy="STRICT_SPREAD")
    try:
        ray.get(group.ready())
        places = [
            {
                "num_gpus": gpus,
                "num_cpus": 1,
                "max_retries": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index),
            }
            for index in range(nodes)
        ]
        coordinator = ray.get(ray.remote(address).options(**places[0]).remote())
        counts = [f"hosts.processes={nodes}", f"hosts.devices={nodes * gpus}"]
        started = [
            ray.remote(train)
            .options(**place)
            .remote(
                [*arguments, *counts],
                {
                    "JAXFT_COORDINATOR": coordinator,
                    "JAXFT_PROCESSES": str(nodes),
                    "JAXFT_PROCESS": str(index),
                },
            )
            for index, place in enumerate(places)
        ]
        return overall(ray.get(started))
    except ray.exceptions.RayError as error:
        print(f"a node was lost: {error}", file=sys.stderr)
        return 137
    finally:
        remove_placement_group(group)


def main(argv: list[str]) -> int:
    """Start the run, and start it again as long as that helps."""
    if len(argv) < 3 or not (argv[0].isdigit() and argv[1].isdigit()):
        print("usage: ray_train.py NODES GPUS RECIPE [knob=value ...]", file=sys.stderr)
        return 2
    import ray

    ray.init()
    restarts = int(os.environ.get("JAXFT_RESTARTS", "20"))
    for left in range(restarts, -1, -1):
        code = attempt(ray, int(argv[0]), int(argv[1]), argv[2:])
        if code not in RESTART_CODES or not left:
            break
        print(f"exit code {code}: started again, resumes from the newest checkpoint", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
