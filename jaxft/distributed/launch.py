"""Detect this process's index and the coordinator's address from the environment variables of the launcher,
such as torchrun or SLURM's srun.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.distributed.xla_flags import has_tpu, is_installed

PORT = 8476  # default port of the coordinator
MOST_PROCESSES = 1 << 17
JAXFT_VARIABLES = ("JAXFT_COORDINATOR", "JAXFT_PROCESSES", "JAXFT_PROCESS")
_NUMBER = r"\d{1,18}"
SLURM = {  # set by srun, not by sbatch alone; JAX takes coordinator and index from them
    "SLURM_JOB_ID": _NUMBER,
    "SLURM_STEP_NODELIST": r"[\w.-]+(\[\d.*)?(,.*)?",
    "SLURM_NTASKS": _NUMBER,
    "SLURM_PROCID": _NUMBER,
    "SLURM_LOCALID": _NUMBER,
}
OPEN_MPI = {  # likewise
    "OMPI_MCA_orte_hnp_uri": r"\d{1,18}\..*tcp(://|6://\[).+",
    "OMPI_COMM_WORLD_RANK": _NUMBER,
    "OMPI_COMM_WORLD_LOCAL_RANK": _NUMBER,
}


@dataclass(frozen=True)
class Launch:
    """The launch of one process of a multi-process run.

    launcher: source of the values, for messages: "SLURM", or "explicit" for settings and JAXFT_* variables.
    coordinator: host:port of process 0. processes: number of processes in the run. process: index of this
    process. Values that JAX itself detects are None. local_gpus: indices of the host's GPUs that this process
    uses; None for JAX's default.
    """

    launcher: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local_gpus: tuple[int, ...] | None = None


def detect(explicit: tuple[str | None, int | None, int | None], environ: Mapping[str, str]) -> Launch | None:
    """Return the launch of this process, or None for a single-process run.

    explicit: the settings hosts.coordinator, hosts.processes and hosts.process, each None if not set. Without
    hosts.coordinator the other two are not used here. environ: the environment variables.

    A value that is not set is taken from JAXFT_COORDINATOR, JAXFT_PROCESSES (1 for a single-process run) and
    JAXFT_PROCESS, then from the first of these launchers that started the process: torchrun, SkyPilot, Open
    MPI, SLURM, Cloud TPU, Kubernetes. Raises ValueError if the values are incomplete or contradictory.
    """
    coordinator = explicit[0] or environ.get(JAXFT_VARIABLES[0])
    settings = explicit[1:] if explicit[0] else (None, None)
    configured = [
        value if value is not None else _number(environ, name)
        for value, name in zip(settings, JAXFT_VARIABLES[1:], strict=True)
    ]
    if configured[0] == 1:
        return None
    detected = next((launch for detector in LAUNCHERS if (launch := detector(environ)) is not None), None)
    if coordinator is None:
        if any(environ.get(name) for name in JAXFT_VARIABLES):
            raise ValueError(
                f"{JAXFT_VARIABLES[1]} and {JAXFT_VARIABLES[2]} need {JAXFT_VARIABLES[0]}=host:port of "
                "process 0; set it too"
            )
        return None if detected is None or detected.processes == 1 else detected
    known = Launch("") if detected is None else detected
    processes, process = (
        value if value is not None else other
        for value, other in zip(configured, (known.processes, known.process), strict=True)
    )
    if processes == 1:
        return None
    if processes is None or process is None:
        raise ValueError(
            f"coordinator={coordinator}: the number of processes or the index of this one is missing; set "
            f"{JAXFT_VARIABLES[1]} and {JAXFT_VARIABLES[2]} or, with hosts.coordinator, hosts.processes and "
            "hosts.process"
        )
    launcher = "explicit" if detected is None else f"explicit, {detected.launcher}"
    return _checked(Launch(launcher, coordinator, processes, process, known.local_gpus))


def _checked(launch: Launch) -> Launch:
    if launch.coordinator is not None:
        address = re.fullmatch(r"[\w.:%\[\]-]+:(\d{1,5})", launch.coordinator, re.ASCII)
        if address is None or not 0 < int(address[1]) < 1 << 16:
            raise ValueError(
                f"coordinator={launch.coordinator:.60} ({launch.launcher}): expected host:port of process 0, "
                "with a port from 1 to 65535; correct hosts.coordinator or the launcher's variables"
            )
    if launch.processes is not None and launch.processes > MOST_PROCESSES:
        raise ValueError(
            f"{launch.processes} processes ({launch.launcher}): at most {MOST_PROCESSES} are possible; "
            "correct hosts.processes or the launcher's variables"
        )
    count, index = launch.processes, launch.process
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(
            f"process {index} of {count} ({launch.launcher}): process indices start at 0 and end at "
            f"{count - 1}; correct hosts.process or the launcher's variables"
        )
    return launch


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if not text:
        return None
    if not re.fullmatch(_NUMBER, text, re.ASCII):
        raise ValueError(
            f"{name}={text:.60}: expected a non-negative integer below 10^18; correct the variable"
        )
    return int(text)


def _local_gpus(
    environ: Mapping[str, str], rank: int | None, processes: int | None
) -> tuple[int, ...] | None:
    """Return the indices of the GPUs that a process uses, among those that it can see; None if JAX decides.

    rank: index of the process among the `processes` on this host; None if unknown. The number of GPUs is that
    of CUDA_VISIBLE_DEVICES, or of SLURM_GPUS_ON_NODE.

    A process uses all GPUs if it is the only process on the host, if SLURM assigned GPUs to each task, or if
    CUDA_VISIBLE_DEVICES lists fewer GPUs than there are processes. Otherwise the processes divide the GPUs
    evenly; ValueError if that is impossible. If the number of GPUs or of processes is unknown, process `rank`
    uses the GPU `rank`. JAX decides if JAX_LOCAL_DEVICE_IDS is set or if `rank` is None.
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # JAX reads it
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    on_node = re.search(r"\d+$", environ.get("SLURM_GPUS_ON_NODE", ""))  # 8, or gpu:8
    count = len(visible.split(",")) if visible else (int(on_node[0]) if on_node else 0) or None
    per_task = bool(visible) and bool(environ.get("SLURM_GPUS_PER_TASK"))
    if count is not None and (
        count == 1 or processes == 1 or per_task or (visible and processes is not None and count < processes)
    ):
        return tuple(range(count))
    if rank is None or processes == 1:
        return None
    if count is None or processes is None:
        return (rank,)
    if count % processes:
        raise ValueError(
            f"{count} GPUs are not divisible by the {processes} processes of the host; "
            f"start a number of processes that divides {count}"
        )
    return tuple(range(rank * count // processes, (rank + 1) * count // processes))


def _tasks_on_node(environ: Mapping[str, str]) -> int | None:
    """Return the number of SLURM tasks on this node; None if unknown.

    SLURM lists it for all nodes: `2(x3),1` means 2 tasks on each of the first three nodes, then 1.
    """
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    parts = [re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part) for part in listed.split(",")]
    counts = [int(m[1]) for m in parts if m for _ in range(int(m[2] or 1))]
    if not all(parts) or not counts:
        return None
    node = _number(environ, "SLURM_NODEID")
    if node is not None and node < len(counts):
        return counts[node]
    return counts[0] if len(set(counts)) == 1 else None


def _torchrun(environ: Mapping[str, str]) -> Launch | None:
    """Return the launch by torchrun, or by another launcher that sets torchrun's variables MASTER_ADDR,
    MASTER_PORT, RANK and WORLD_SIZE; None if one of these is not set.

    Kubeflow's PyTorchJob, which starts one process per pod, sets no LOCAL_RANK.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    if any(name not in environ for name in names):
        return None
    port, rank, world = (_number(environ, name) for name in names[1:])
    if not world or rank is None or port is None:
        raise ValueError(
            f"invalid torchrun variables: {', '.join(f'{n}={environ[n]!r}' for n in names)}; start the "
            "processes with torchrun, or unset these variables"
        )
    local = _local_gpus(environ, _number(environ, "LOCAL_RANK"), _number(environ, "LOCAL_WORLD_SIZE"))
    # port + 1: torchrun's own store listens on MASTER_PORT
    return _checked(Launch("torchrun", f"{environ['MASTER_ADDR']}:{port + 1}", world, rank, local))


def _skypilot(environ: Mapping[str, str]) -> Launch | None:
    """Return the launch by SkyPilot, which starts one process on each node. Return None if SkyPilot's
    variables are not set, and on TPU slices, where JAX detects the order of the hosts.
    """
    if "SKYPILOT_NODE_RANK" not in environ or "SKYPILOT_NODE_IPS" not in environ or _on_tpu(environ):
        return None
    addresses = environ["SKYPILOT_NODE_IPS"].split()
    rank, count = _number(environ, "SKYPILOT_NODE_RANK"), _number(environ, "SKYPILOT_NUM_NODES")
    if not addresses:
        raise ValueError(
            "SKYPILOT_NODE_IPS is empty; set it to the addresses of all nodes, rank 0 first, or unset it for "
            "a launch without SkyPilot"
        )
    if count is not None and count != len(addresses):
        raise ValueError(
            f"SKYPILOT_NUM_NODES={count} does not match the {len(addresses)} addresses in SKYPILOT_NODE_IPS; "
            "correct one of them"
        )
    return _checked(Launch("SkyPilot", f"{addresses[0]}:{PORT}", len(addresses), rank))


def _open_mpi(environ: Mapping[str, str]) -> Launch | None:
    size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if size is None:
        return None
    if size > 1 and "OMPI_MCA_orte_hnp_uri" not in environ and not environ.get(JAXFT_VARIABLES[0]):
        raise ValueError(
            f"Open MPI sets no address of rank 0; set {JAXFT_VARIABLES[0]}=host:port of rank 0 "
            f"(mpirun -x {JAXFT_VARIABLES[0]}=...)"
        )
    if size > 1:
        _check_detectable("Open MPI", environ, OPEN_MPI)
    names = ("RANK", "LOCAL_RANK", "LOCAL_SIZE")
    rank, *local = (_number(environ, f"OMPI_COMM_WORLD_{name}") for name in names)
    return _checked(Launch("Open MPI", None, size, rank, _local_gpus(environ, *local)))


def _check_detectable(launcher: str, environ: Mapping[str, str], patterns: Mapping[str, str]) -> None:
    """Raise ValueError if JAX could not parse one of the launcher's variables: its value does not match its
    pattern. Nothing is checked if JAXFT_COORDINATOR is set, which replaces the launcher's variables.

    patterns: variable -> regular expression.
    """
    for name, pattern in patterns.items():
        text = environ.get(name, "")
        if not re.fullmatch(pattern, text, re.ASCII) and not environ.get(JAXFT_VARIABLES[0]):
            raise ValueError(
                f"{name}={text:.60} is malformed ({launcher}); set {JAXFT_VARIABLES[0]}=host:port of process "
                f"0, {JAXFT_VARIABLES[1]} and {JAXFT_VARIABLES[2]}"
            )


def _slurm(environ: Mapping[str, str]) -> Launch | None:
    """Return the launch by SLURM's srun; None if srun's variables are not set. A task that is alone on its
    node uses all GPUs of the node; JAX's default is the first one.
    """
    if any(name not in environ for name in SLURM):
        return None
    size, rank, local = (_number(environ, name) for name in list(SLURM)[2:])
    if size != 1:
        _check_detectable("SLURM", environ, SLURM)
    local_gpus = _local_gpus(environ, local, _tasks_on_node(environ))
    return _checked(Launch("SLURM", None, size, rank, local_gpus))


def _cloud_tpu(environ: Mapping[str, str]) -> Launch | None:
    if not _on_tpu(environ):
        return None
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        slices = _number(environ, "MEGASCALE_NUM_SLICES") or 1
        return Launch("Cloud TPU", None, len(hosts.split(",")) * slices)
    # without hosts in the environment JAX queries the metadata server
    return Launch("Cloud TPU") if "TPU_SKIP_MDS_QUERY" not in environ else None


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPUs that JAX would use."""
    platforms = environ.get("JAX_PLATFORMS", "")
    is_allowed = not platforms or "tpu" in platforms.split(",")
    return is_allowed and is_installed("libtpu") and has_tpu()


def _kubernetes(environ: Mapping[str, str]) -> Launch | None:
    """Return the launch of a pod of an indexed Kubernetes job; None outside such a job. JAX finds the other
    pods through the Kubernetes API. Raises ValueError if the Python package `kubernetes` is missing and
    JAXFT_COORDINATOR is not set.
    """
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX")
    if importlib.util.find_spec("kubernetes") is None and not environ.get(JAXFT_VARIABLES[0]):
        raise ValueError(
            f"pod {index} of an indexed Kubernetes job: JAX needs the package kubernetes to find the other "
            f"pods; set {JAXFT_VARIABLES[0]}=host:port of pod 0, {JAXFT_VARIABLES[1]} and "
            f"{JAXFT_VARIABLES[2]} as scripts/launch/jobset.yaml does, or {JAXFT_VARIABLES[1]}=1 if each "
            "pod is a separate run"
        )
    return Launch("Kubernetes", None, None, index)


LAUNCHERS = (_torchrun, _skypilot, _open_mpi, _slurm, _cloud_tpu, _kubernetes)
