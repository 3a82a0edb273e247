"""Which process this is, from what launchers set; launch files say what detection and scripts/train.py take."""

import json
import os
import runpy
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml

from jaxft.distributed import launch, processes
from jaxft.distributed.launch import Launch, detect
from jaxft.runs import config
from jaxft.train.settings import Run

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "scripts" / "launch"
NONE = (None, None, None)

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
TORCHRUN = {
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}
SKYPILOT = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n", "SKYPILOT_NUM_NODES": "2"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}  # of an indexed job
FOUR = {"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
OWN = {"JAXFT_COORDINATOR": "h:1", "JAXFT_PROCESSES": "2", "JAXFT_PROCESS": "1"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        (
            {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"},
            None,
        ),  # in the batch script, before srun
        (SLURM, Launch("SLURM", None, 16, 9, (1,))),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_GPUS_ON_NODE": "8"},
            Launch("SLURM", None, 16, 9, tuple(range(8))),
        ),
        ({**SLURM, **FOUR, "SLURM_GPUS_ON_NODE": "0"}, Launch("SLURM", None, 16, 9, (1,))),  # CPUs
        (
            {**SLURM, "CUDA_VISIBLE_DEVICES": "5"},
            Launch("SLURM", None, 16, 9, (0,)),
        ),  # srun --gpus-per-task=1
        (  # srun --gpus-per-task=2, four tasks a node: a task sees its own two
            {
                **SLURM,
                **FOUR,
                "SLURM_LOCALID": "3",
                "SLURM_GPUS_PER_TASK": "2",
                "CUDA_VISIBLE_DEVICES": "0,1",
            },
            Launch("SLURM", None, 16, 9, (0, 1)),
        ),
        (
            {**SLURM, **FOUR, "SLURM_GPUS_ON_NODE": "gpu:8"},
            Launch("SLURM", None, 16, 9, (2, 3)),
        ),  # all see all of them
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8,2", "SLURM_NODEID": "1", **EIGHT},
            Launch("SLURM", None, 16, 9, (4, 5, 6, 7)),
        ),
        ({**TORCHRUN, **EIGHT}, Launch("torchrun", "a:29501", 4, 3, (4, 5, 6, 7))),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "2,3"}, Launch("SLURM", None, 16, 9)),
        (TORCHRUN, Launch("torchrun", "a:29501", 4, 3, (1,))),
        ({**TORCHRUN, **SLURM}, Launch("torchrun", "a:29501", 4, 3, (1,))),  # torchrun under srun
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (SKYPILOT, Launch("SkyPilot", f"10.0.0.1:{launch.PORT}", 2, 1)),
        (
            {**SKYPILOT, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            Launch("SkyPilot", f"10.0.0.1:{launch.PORT}", 2, 1),
        ),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "1"}, None),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": "1;tcp://a:1"}, Launch("Open MPI", None, 4, 3, (1,))),
        ({**MPI, "JAXFT_COORDINATOR": "h:1"}, Launch("explicit, Open MPI", "h:1", 4, 3, (1,))),
        (OWN, Launch("explicit", "h:1", 2, 1)),
        ({**OWN, "JAXFT_PROCESSES": "1", "JAXFT_PROCESS": "0"}, None),
        ({"JAXFT_PROCESSES": "1"}, None),
        ({**POD, "JAXFT_PROCESSES": "1"}, None),
        ({**POD, **OWN}, Launch("explicit, Kubernetes", "h:1", 2, 1)),
    ],
)
def test_who_this_process_is(environ, wanted):
    assert detect(NONE, environ) == wanted


def test_gpus_that_do_not_divide_over_the_processes_of_a_host():
    with pytest.raises(
        ValueError, match="3 processes on a host that see 8 GPUs: they don't divide; start a divisor of 8"
    ):
        detect(NONE, {**TORCHRUN, **EIGHT, "LOCAL_WORLD_SIZE": "3"})


def test_only_known_processes_beside_this_one_keep_a_sweep_from_starting(monkeypatch):
    monkeypatch.setattr(
        launch, "detect", lambda *_: Launch("Cloud TPU")
    )  # jax asks the metadata server how many there are
    processes.refuse_several("a sweep")
    for found in (Launch("Cloud TPU", None, 2), Launch("Kubernetes", None, None, 0)):
        monkeypatch.setattr(launch, "detect", lambda *_, found=found: found)
        with pytest.raises(ValueError, match="a sweep runs in one process, and this is one of several"):
            processes.refuse_several("a sweep")


def test_what_the_settings_say_comes_first():
    assert detect(("x:9", 4, 2), {**SLURM, **OWN}) == Launch("explicit, SLURM", "x:9", 4, 2, (1,))
    assert detect((None, 16, None), SLURM).by == "SLURM"  # a claim, no launch
    assert detect((None, 3, None), OWN) == Launch(
        "explicit", "h:1", 2, 1
    )  # a claim beside what the environment says
    assert detect((None, 1, None), OWN).processes == 2
    assert detect((None, 3, None), {**OWN, "JAXFT_PROCESSES": "1", "JAXFT_PROCESS": "0"}) is None
    assert detect((None, 1, None), {}) is None


@pytest.mark.parametrize(
    ("explicit", "environ", "words"),
    [
        (("h:1", None, None), {}, "JAXFT_PROCESSES, JAXFT_PROCESS"),
        (("h", 2, 0), {}, "wanted host:port"),
        (("h:1", 2, 2), {}, "process 2 of 2"),
        (NONE, {"JAXFT_PROCESSES": "2", "JAXFT_PROCESS": "0"}, "JAXFT_COORDINATOR=host:port"),
        (NONE, {**OWN, "JAXFT_PROCESS": "one"}, "JAXFT_PROCESS=one"),
        (NONE, MPI, "JAXFT_COORDINATOR=host:port"),
        (NONE, {**TORCHRUN, "RANK": ""}, "RANK=''"),
        (NONE, POD, "JAXFT_COORDINATOR=host:port of pod 0"),
        (NONE, {**SKYPILOT, "SKYPILOT_NUM_NODES": "3"}, "SKYPILOT_NODE_IPS has 2 addresses"),
    ],
)
def test_contradictions_are_one_line_that_says_what_to_set(explicit, environ, words, monkeypatch):
    monkeypatch.setattr(
        launch.importlib.util, "find_spec", lambda name: None
    )  # neither libtpu nor Kubernetes' client
    with pytest.raises(ValueError, match=r"^[^\n]+$") as found:
        detect(explicit, environ)
    assert words in str(found.value)


def accepted(arguments):
    """The Run that scripts/train.py makes of these arguments, of a small model."""
    parser = runpy.run_path(str(ROOT / "scripts" / "train.py"))["arguments"]()
    args = parser.parse_intermixed_args(arguments)
    path = ROOT / "configs" / Path(args.config).name
    assert args.config.endswith("configs/llama31_8b_sft.py") and path.is_file()
    known = config.load_config(str(path), [*args.overrides, f"model={tiny_folder()}"])
    assert isinstance(known, Run)
    rows, left = divmod(known.data.batch, known.data.micro)
    assert left == 0 and rows % known.hosts.devices == 0, "some devices would compute nothing but padding"
    return known


def tiny_folder():
    """A model's folder with nothing but a small config."""
    folder = Path(tempfile.mkdtemp())
    small = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    small |= {
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(small))
    return folder


def shell(script, folder, commands, **environ):
    """Run a shell script with commands of ours in front of the system's; each writes its arguments, one a line, to a file."""
    for name, code in commands.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{folder}/{name}.told"\nexit {code}\n')
        path.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", **environ}
    done = subprocess.run(["bash", *script], env=env, capture_output=True, text=True, timeout=30, check=False)
    told = {
        name: (folder / f"{name}.told").read_text().splitlines()
        for name in commands
        if (folder / f"{name}.told").exists()
    }
    return done.returncode, told


AGAIN = (75, 134, 137, 143)  # exit codes of what a new start mends


@pytest.mark.parametrize(
    ("code", "before", "again"),
    [
        (0, None, False),
        (1, None, False),
        *((code, None, True) for code in AGAIN),
        (75, "19", True),
        (75, "20", False),
    ],
)
def test_the_slurm_script_starts_a_task_a_gpu_and_queues_again_what_is_to_go_on(
    tmp_path, code, before, again
):
    text = (FILES / "slurm.sbatch").read_text()
    asked = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    settings = dict(line.split("=", 1) for line in asked if "=" in line)
    assert settings["ntasks-per-node"] == settings["gpus-per-node"] and settings["signal"] == "TERM@300"
    environ = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": settings["nodes"]}
    environ |= {
        "SLURM_NTASKS_PER_NODE": settings["ntasks-per-node"],
        "SLURM_GPUS_ON_NODE": settings["gpus-per-node"],
    }
    environ |= {} if before is None else {"SLURM_RESTART_COUNT": before}
    found, told = shell([str(FILES / "slurm.sbatch")], tmp_path, {"srun": code, "scontrol": 0}, **environ)
    assert found == code and ("scontrol" in told) == again
    command = told["srun"]
    run = accepted(command[command.index(str(ROOT / "scripts" / "train.py")) + 1 :])
    assert (run.hosts.processes, run.hosts.devices) == (16, 16)


def test_the_skypilot_task_is_one_that_its_schema_and_train_take(tmp_path):
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    assert task.keys() <= {
        "name",
        "num_nodes",
        "resources",
        "workdir",
        "volumes",
        "file_mounts",
        "envs",
        "secrets",
        "setup",
        "run",
    }
    assert task["resources"].keys() <= {
        "accelerators",
        "use_spot",
        "job_recovery",
        "infra",
        "disk_size",
        "image_id",
    }
    assert task["resources"]["job_recovery"].keys() <= {
        "strategy",
        "max_restarts_on_errors",
        "recover_on_exit_codes",
    }
    assert (
        not task["volumes"] or task["resources"]["job_recovery"]["strategy"] == "FAILOVER"
    )  # a volume lies in one region
    assert all(isinstance(v, str) for v in task["envs"].values()) and task["num_nodes"] == 2
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0
    code, told = skypilot_run(task, tmp_path, 0)
    run = accepted(told[1:])
    assert code == 0 and (run.hosts.processes, run.hosts.devices) == (2, 16)
    assert detect(NONE, SKYPILOT).processes == task["num_nodes"]


def skypilot_run(task, folder, code, **environ):
    """(exit code, arguments of Python, which ends with `code`) of a SkyPilot task's commands on a node."""
    script, python = folder / "run.sh", folder / ".venv" / "bin" / "python"
    script.write_text(task["run"].replace("/shared/work", str(folder / "work")))
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{folder}/told"\nexit {code}\n')
    python.chmod(0o755)
    environ = {
        **SKYPILOT,
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "t",
        **task["envs"],
        **environ,
    }
    environ["PATH"] = os.environ["PATH"]
    done = subprocess.run(
        ["bash", str(script)], env=environ, cwd=folder, stdout=subprocess.DEVNULL, timeout=30, check=False
    )
    return done.returncode, (folder / "told").read_text().splitlines()


def test_the_skypilot_task_asks_for_a_new_start_of_what_is_to_go_on_and_not_for_ever(tmp_path):
    """SkyPilot itself would start again without a limit, and notes 137 for a node that it stops because another one failed."""
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    run = lambda code, **environ: skypilot_run(task, tmp_path, code, RESTARTS="5", **environ)[0]  # noqa: E731
    assert [run(code) for code in (1, 2, 0, *AGAIN)] == [1, 2, 0, 75, 75, 75, 75]
    assert [run(75), run(75), run(75)] == [75, 1, 1]
    assert run(75, SKYPILOT_NODE_RANK="0") == run(75, SKYPILOT_TASK_ID="another") == 75


def test_the_jobset_is_one_that_kubernetes_detection_and_train_take():
    jobset = yaml.safe_load((FILES / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert spec.keys() <= {
        "network",
        "successPolicy",
        "failurePolicy",
        "replicatedJobs",
        "suspend",
        "ttlSecondsAfterFinished",
    }
    (job,) = spec["replicatedJobs"]
    inner = job["template"]["spec"]
    assert (
        inner["completionMode"] == "Indexed"
        and inner["backoffLimit"] == 0
        and inner["completions"] == inner["parallelism"]
    )
    (rule,) = inner["podFailurePolicy"]["rules"]
    (consequence,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and spec["failurePolicy"]["maxRestarts"] <= 20
    assert (consequence["action"], consequence["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    pod = inner["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "NotIn",
        "values": [*AGAIN],
    }
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environ = {}
    for entry in container["env"]:
        assert isinstance(entry.get("value", ""), str), entry  # Kubernetes takes no numbers here
        where = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        environ[entry["name"]] = "1" if where == index else entry.get("value", "")
    found = detect(NONE, environ | POD)
    host, port = found.coordinator.split(":")
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{job['name']}-0-0.{name}" and spec["network"]["enableDNSHostnames"]
    assert int(port) in [p["containerPort"] for p in container["ports"]]
    assert (found.processes, found.process) == (inner["completions"], 1)
    assert container["command"][-1].endswith("/scripts/train.py")
    run = accepted(container["args"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert (run.hosts.processes, run.hosts.devices) == (inner["completions"], inner["completions"] * gpus)
