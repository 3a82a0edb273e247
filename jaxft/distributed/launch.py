"""Which of several processes this one is, read off what its launcher has put into the environment."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PORT = 8476  # of the coordinator where the launcher names none
OWN = ("JAXFT_COORDINATOR", "JAXFT_PROCESSES", "JAXFT_PROCESS")
SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)  # set by srun, not by sbatch alone
GOOGLE = "0x1ae0"  # PCI vendor of a TPU


@dataclass(frozen=True)
class Launch:
    """A process among several. by: who says so.

    coordinator (host:port of process 0), processes, process: None where jax finds them by itself. local: which of the host's
    GPUs are this process's, None as jax decides.
    """

    by: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local: tuple[int, ...] | None = None


def detect(explicit: tuple[str | None, int | None, int | None], environ: Mapping[str, str]) -> Launch | None:
    """This process's place, None where it is alone.

    explicit: (coordinator, processes, process) of the settings; what is None there is taken from JAXFT_COORDINATOR,
    JAXFT_PROCESSES (1: alone) and JAXFT_PROCESS, then from torchrun, SkyPilot, Open MPI, SLURM, Cloud TPU, Kubernetes, in this
    order. A count without a coordinator beside it in the settings is no launch but a claim, see distributed.Hosts. Raises
    ValueError for what contradicts itself.
    """
    coordinator = explicit[0] or environ.get(OWN[0])
    known = explicit[1:] if explicit[0] else (None, None)
    given = [
        value if value is not None else _number(environ, name)
        for value, name in zip(known, OWN[1:], strict=True)
    ]
    if given[0] == 1:
        return None
    found = next((launch for look in LAUNCHERS if (launch := look(environ)) is not None), None)
    if coordinator is None:
        if any(environ.get(name) for name in OWN):
            raise ValueError(f"{OWN[1]} and {OWN[2]} go with {OWN[0]}=host:port of process 0; set that too")
        return None if found is None or found.processes == 1 else found
    launched = (None, None) if found is None else (found.processes, found.process)
    counts = [value if value is not None else other for value, other in zip(given, launched, strict=True)]
    if counts[0] == 1:
        return None
    if None in counts:
        raise ValueError(
            f"coordinator={coordinator}: wanted the number of processes and this one's too ({OWN[1]}, {OWN[2]})"
        )
    by = "explicit" if found is None else f"explicit, {found.by}"
    return _checked(Launch(by, coordinator, counts[0], counts[1], found.local if found else None))


def _checked(launch: Launch) -> Launch:
    if launch.coordinator is not None and not re.fullmatch(r".+:\d+", launch.coordinator):
        raise ValueError(f"coordinator={launch.coordinator} ({launch.by}): wanted host:port of process 0")
    if (
        launch.processes is not None
        and launch.process is not None
        and not 0 <= launch.process < launch.processes
    ):
        raise ValueError(
            f"process {launch.process} of {launch.processes} ({launch.by}): they are counted from 0"
        )
    return launch


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name}={text}: wanted a whole number")
    return int(text)


def _own_gpus(environ: Mapping[str, str], local: int | None, beside: int | None) -> tuple[int, ...] | None:
    """The GPUs, among those it sees, of the process number `local` of `beside` on its host; None where that can't be told.

    A process that sees fewer GPUs than processes stand beside it, or whose launcher gave each its own, has all that it sees.
    Raises ValueError where those that all see don't divide over the processes.
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # jax reads it
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    on_node = re.search(r"\d+$", environ.get("SLURM_GPUS_ON_NODE", ""))  # 8, or gpu:8
    count = len(visible.split(",")) if visible else (int(on_node[0]) if on_node else 0) or None
    apart = bool(visible) and bool(environ.get("SLURM_GPUS_PER_TASK"))
    if count is not None and (
        count == 1 or beside == 1 or apart or (visible and beside is not None and count < beside)
    ):
        return tuple(range(count))
    if local is None or beside == 1:
        return None
    if count is None or beside is None:
        return (local,)
    if count % beside:
        raise ValueError(
            f"{beside} processes on a host that see {count} GPUs: they don't divide; start a divisor of {count}"
        )
    return tuple(range(local * count // beside, (local + 1) * count // beside))


def _tasks_beside(environ: Mapping[str, str]) -> int | None:
    """Tasks on this node, from a list such as 2(x3),1 and this node's place in it; None where either isn't known."""
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in listed.split(",")]
    each = [int(m[1]) for m in parts if m for _ in range(int(m[2] or 1))]
    if not all(parts) or not each:
        return None
    node = _number(environ, "SLURM_NODEID")
    return each[node] if node is not None and node < len(each) else each[0] if len(set(each)) == 1 else None


def _torchrun(environ: Mapping[str, str]) -> Launch | None:
    """torchrun, and what imitates its variables. Kubeflow's PyTorchJob sets no LOCAL_RANK: one process a pod."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    if any(name not in environ for name in names):
        return None
    port, rank, world = (_number(environ, name) for name in names[1:])
    if not world or rank is None or port is None:
        raise ValueError(
            f"torchrun's variables are incomplete: {', '.join(f'{n}={environ[n]!r}' for n in names)}"
        )
    local = _own_gpus(environ, _number(environ, "LOCAL_RANK"), _number(environ, "LOCAL_WORLD_SIZE"))
    # its own store listens on MASTER_PORT
    return _checked(Launch("torchrun", f"{environ['MASTER_ADDR']}:{port + 1}", world, rank, local))


def _skypilot(environ: Mapping[str, str]) -> Launch | None:
    """One process a node. A TPU slice's hosts are nodes too, but their order is jax's to find."""
    if "SKYPILOT_NODE_RANK" not in environ or "SKYPILOT_NODE_IPS" not in environ or _on_tpu(environ):
        return None
    addresses = environ["SKYPILOT_NODE_IPS"].split()
    rank, count = _number(environ, "SKYPILOT_NODE_RANK"), _number(environ, "SKYPILOT_NUM_NODES")
    if not addresses or (count is not None and count != len(addresses)):
        raise ValueError(
            f"SKYPILOT_NUM_NODES={count} and SKYPILOT_NODE_IPS has {len(addresses)} addresses; they don't agree"
        )
    return _checked(Launch("SkyPilot", f"{addresses[0]}:{PORT}", len(addresses), rank))


def _open_mpi(environ: Mapping[str, str]) -> Launch | None:
    size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if size is None:
        return None
    if size > 1 and "OMPI_MCA_orte_hnp_uri" not in environ and not environ.get(OWN[0]):
        raise ValueError(
            f"this Open MPI doesn't say where process 0 is; set {OWN[0]}=host:port of rank 0 (mpirun -x {OWN[0]}=...)"
        )
    local = _own_gpus(
        environ,
        _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
    )
    return Launch("Open MPI", None, size, _number(environ, "OMPI_COMM_WORLD_RANK"), local)


def _slurm(environ: Mapping[str, str]) -> Launch | None:
    """A task of srun. With one task a node it has all of the node's GPUs, where jax alone would take the first."""
    if any(name not in environ for name in SLURM):
        return None
    size, rank, local = (_number(environ, name) for name in SLURM[2:])
    return Launch("SLURM", None, size, rank, _own_gpus(environ, local, _tasks_beside(environ)))


def _cloud_tpu(environ: Mapping[str, str]) -> Launch | None:
    if not _on_tpu(environ):
        return None
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return Launch(
            "Cloud TPU", None, len(hosts.split(",")) * (_number(environ, "MEGASCALE_NUM_SLICES") or 1)
        )
    return (
        Launch("Cloud TPU") if "TPU_SKIP_MDS_QUERY" not in environ else None
    )  # jax asks the metadata server


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPUs that jax would use."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms.split(",")) or importlib.util.find_spec("libtpu") is None:
        return False
    return any(
        vendor.read_text().strip() == GOOGLE for vendor in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def _kubernetes(environ: Mapping[str, str]) -> Launch | None:
    """A pod of an indexed job, which jax looks up through Kubernetes' API; raises ValueError where its client is missing."""
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX")
    if importlib.util.find_spec("kubernetes") is None and not environ.get(OWN[0]):
        raise ValueError(
            f"this is pod {index} of an indexed Kubernetes job; jax finds the others only with the package kubernetes; set "
            f"{OWN[0]}=host:port of pod 0, {OWN[1]} and {OWN[2]} as scripts/launch/jobset.yaml does, or {OWN[1]}=1 "
            "where each pod runs by itself"
        )
    return Launch("Kubernetes", None, None, index)


LAUNCHERS = (_torchrun, _skypilot, _open_mpi, _slurm, _cloud_tpu, _kubernetes)
