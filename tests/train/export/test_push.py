"""jaxft push: what a run or a folder sends to a hub-shaped server on this machine, and what it refuses."""

import os
import shutil
import subprocess
import sys

import hub_server
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from gguf_files import write_file
from hub_uploads import DROP, Repo, card_errors, serve_uploads
from scripts_in_process import SCRIPTS, call
from tiny_run import Place, rows, write_place

from jaxft.weights.hf import hub as hub_module
from jaxft.weights.hf.hub_upload import Uploaded

REPO = "org/tiny"
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
PICTURES = ["curves.png", "training.png"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
SECRET = "SECRETSIG"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a working directory with a finished run, whose rows are behind a signed URL.

    output.txt is what it printed, with that of the same command with another signature, which resumes it.
    """
    place = Place(tmp_path_factory.mktemp("push"))
    write_place(place.folder)
    (place.folder / "served").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows()), place.folder / "served" / "rows.parquet", row_group_size=20
    )
    with hub_server.serve_dataset(place.folder / "served", "org/set") as (endpoint, _):
        for secret in (SECRET, f"{SECRET}2"):
            data = f"data={endpoint}/content/rows.parquet?X-Amz-Signature={secret}&token=hf_{secret}"
            assert place.run("name=sft", "steps=2", "samples=1", data, PICTURES="1") == 0, place.err()
            with (place.folder / "output.txt").open("a") as file:
                file.write(place.out() + place.err())
    return place.folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, which may be damaged; its base is where it was."""
    return shutil.copytree(trained / "runs" / "sft", tmp_path / "runs" / "sft")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_uploads() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def push(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    return lambda *args: call(monkeypatch, capsys, "push", *args)


def assert_refused(result, *words):
    """Check that a command ended with one line on its error, and printed nothing as done."""
    code, out, err = result
    *before, line = err.splitlines()
    assert code in (1, 2) and not out and line.startswith("error: "), (code, out, err)
    assert not any(other.startswith("error") for other in before)
    assert all(word in line for word in words), line


@pytest.mark.slow
def test_the_command_pushes_in_a_process_of_its_own(hub, run, trained):
    """Where nothing has imported the submodules of huggingface_hub before, and with no token it says so."""
    command = [sys.executable, str(SCRIPTS / "push.py"), str(run / "adapter"), REPO]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, cwd=trained, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and set(hub.repos[REPO].files()) >= set(ADAPTER), done.stderr
    again = subprocess.run(command, cwd=trained, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and not again.stderr.replace(done.stderr, "").strip(), again.stderr
    environment |= {"HF_TOKEN": "", "HF_HOME": str(trained / "nothing")}
    done = subprocess.run(command, cwd=trained, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: no token"), done.stderr


def test_the_signature_of_a_url_is_nowhere_in_a_run_its_report_its_output_and_its_repository(
    hub, push, run, trained, monkeypatch, capsys
):
    code, out, err = call(monkeypatch, capsys, "report", str(run))
    assert code == 0, err
    pushed = push(run, REPO)
    assert pushed[0] == 0, pushed
    files = {path: path.read_bytes() for path in [*run.rglob("*"), trained / "output.txt"] if path.is_file()}
    files |= hub.repos[REPO].files()
    assert {run / "config.json", run / "env.json", run / "report.html", "README.md"} <= files.keys()
    assert any(path.name == "manifest.json" for path in run.rglob("*"))
    assert not [name for name, content in files.items() if SECRET.encode() in content]
    assert SECRET not in out + err + pushed[1] + pushed[2]
    printed = (trained / "output.txt").read_text()
    assert "this run is finished (2 steps)" in printed and "differ" not in printed
    assert "rows.parquet?***" in (run / "config.json").read_text()
    assert b"on `rows.parquet`" in files["README.md"]


def test_the_card_of_a_run_of_an_earlier_version_is_pushed_without_its_signatures(hub, push, run):
    card = (run / "README.md").read_text()
    (run / "README.md").write_text(card.replace("rows.parquet", f"https://h/rows.parquet?sig={SECRET}"))
    assert push(run, REPO)[0] == 0
    sent = hub.repos[REPO].files()["README.md"]
    assert b"https://h/rows.parquet?***" in sent and SECRET.encode() not in sent


def test_a_run_is_pushed_private_with_its_card_and_nothing_else(hub, push, run):
    (run / "adapter" / "optimizer.pt").write_bytes(b"state")
    (run / "adapter" / "optimizer.safetensors").write_bytes(b"state")
    (run / "adapter" / "LICENSE.txt").write_bytes(b"not of this run")
    code, out, err = push(run, REPO)
    assert code == 0, err
    repo = hub.repos[REPO]
    sent = {name: content for name, content in repo.files().items() if name != ".gitattributes"}
    assert repo.private and set(sent) >= {*ADAPTER, *PICTURES, *TOKENIZER}
    assert not [name for name in sent if "/" in name or name.endswith((".pt", ".jsonl"))]
    assert "summary.json" not in sent and "env.json" not in sent and "config.json" not in sent
    assert {name for name in sent if name.endswith(".safetensors")} == {"adapter_model.safetensors"}
    for name in set(sent) - {*PICTURES, "README.md"}:
        assert sent[name] == (run / "adapter" / name).read_bytes()
    assert "not uploaded: LICENSE.txt, optimizer.pt, optimizer.safetensors" in err
    assert "base of this adapter, base, is not on the hub" in err
    assert f"{hub.address}/{REPO}/tree/main (private)" in out and repo.branches["main"] in out
    card = sent["README.md"].decode()
    assert not card_errors(card) and card.count("## Use") == 1 and "](curves.png)" in card
    assert f'from_pretrained("{REPO}")' in card and "FOLDER" not in card
    assert "jaxft train config.py name=sft steps=2 samples=1" in card.replace("--config ", "")
    assert "eval_loss" in card and "library_name: peft" in card and "base_model" not in card

    requests = len(hub.requests)
    code, out, _ = push(run / "adapter", REPO)  # the same again, named by its weights
    assert code == 0 and "there already" in out and len(repo.messages) == 2
    assert not any(line.startswith("PUT") for line in hub.requests[requests:])


def test_a_merged_model_replaces_an_adapter_and_loads_from_the_hub(hub, push, run, tmp_path, monkeypatch):
    assert push(run, REPO)[0] == 0
    code, out, err = push(run, REPO, "--merged", "--dtype", "float32", "--message", "all of it")
    assert code == 0 and "pushed model" in out, err
    sent = hub.repos[REPO].files()
    assert "adapter_config.json" not in sent and "adapter_model.safetensors" not in sent
    card = sent["README.md"].decode()
    assert hub.repos[REPO].messages[-1] == "all of it" and "library_name: transformers" in card
    assert not card_errors(card) and "with a LoRA adapter merged into it" in card and "eval_loss" in card
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    located = hub_module.locate(REPO)
    assert located.revision == hub.repos[REPO].branches["main"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (located.path / name).read_bytes() == sent[name]


def test_a_branch_is_created_and_the_other_one_stays(hub, push, run):
    assert push(run, REPO, "--public")[0] == 0 and not hub.repos[REPO].private
    before = hub.repos[REPO].branches["main"]
    code, out, _ = push(run / "adapter", REPO, "--public", "--branch", "v2/try")
    branches = hub.repos[REPO].branches
    assert code == 0 and "/tree/v2/try (public)" in out and branches["main"] == before
    assert "adapter_config.json" in hub.repos[REPO].files("v2/try")


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(hub, push, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = push(run, REPO, "--dry-run")
    size = (run / "adapter" / "adapter_config.json").stat().st_size
    assert code == 0 and f"{size} bytes  adapter_config.json" in out and "nothing was sent" in out
    assert not hub.requests and not hub.repos


def test_a_public_repository_is_not_written_unasked(hub, push, run):
    assert push(run, REPO, "--public")[0] == 0
    commits = len(hub.repos[REPO].commits)
    assert_refused(push(run, REPO), REPO, "is public", "--public")
    assert len(hub.repos[REPO].commits) == commits


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({r"PUT /lfs/.*": DROP}, ("failed", "no commit", "was confirmed")),
        ({r"POST .*/commit/main": DROP}, ("failed", "no commit", "was confirmed")),
        ({r"POST .*/commit/main": 409}, ("another change", "start")),
        ({r"POST .*/commit/main": 412}, ("another change", "start")),
        ({r"POST .*/preupload/main": 403}, ("may not write", "no commit")),
        ({r"PUT /lfs/.*": 500}, ("failed", "no commit")),
        ({r"GET /api/models/.*": 500}, ("failed", "was not changed")),
    ],
)
def test_an_upload_that_fails_is_one_line_and_commits_nothing(hub, push, run, fault, words):
    hub.faults.update(fault)
    assert_refused(push(run, REPO), REPO, *words)
    assert not [name for repo in hub.repos.values() for name in repo.files() if name != ".gitattributes"]
    hub.faults.clear()
    code, out, _ = push(run, REPO)  # the same command starts again
    assert code == 0 and "adapter_model.safetensors" in hub.repos[REPO].files() and "pushed adapter" in out


def test_tokens_that_may_not_write_are_refused_with_the_remedy(hub, push, run, monkeypatch):
    assert_refused(push(run, "others/tiny"), "may not write", "a repository of your own")
    for token, words in (("", ("HF_TOKEN", "hf auth login")), ("hf_wrong", ("does not accept the token",)),
                         ("hf_reads", ("may not write",))):  # fmt: skip
        monkeypatch.setenv("HF_TOKEN", token)
        assert_refused(push(run, REPO), *words)
    assert not hub.repos


def test_offline_nothing_is_tried(hub, push, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(push(run, REPO), "HF_HUB_OFFLINE is set")
    assert push(run, REPO, "--dry-run")[0] == 0 and not hub.requests


def unfinished(run):
    (run / "summary.json").unlink()


def truncated(run):
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    (run / "summary.json").write_text('{"steps": 2}')


def half_written(run):
    (run / "adapter" / "adapter_config.json.part").write_text("{")


def linked(run):
    path = run / "adapter" / "LICENSE"
    path.symlink_to(run / "env.json")


def linked_picture(run):
    (run / "training.png").unlink(missing_ok=True)
    (run / "training.png").symlink_to(run / "env.json")


def changed(run):
    (run / "adapter" / "adapter_config.json").write_text("{}")


def continued(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n')


def sweep(run):
    (run / "config.json").write_text('{"members": ["lr=1"]}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unfinished, ("sft: this run is not finished",)),
        (truncated, ("adapter_model.safetensors: not a complete safetensors file",)),
        (half_written, ("adapter_config.json.part", "unfinished export")),
        (linked, ("LICENSE: not a regular file",)),
        (linked_picture, ("sft/training.png: not a regular file",)),
        (changed, ("adapter_config.json: the file has changed",)),
        (continued, ("after step 2, has reached step 3", "finish the run with the command")),
        (sweep, ("is a sweep", "lr=1")),
        (lambda run: shutil.rmtree(run / "adapter"), ("is not finished",)),
    ],
)
def test_what_is_not_a_complete_export_is_refused(hub, push, run, damage, words):
    damage(run)
    assert_refused(push(run, REPO), *words)
    assert not hub.requests


def test_a_model_is_not_merged_that_could_not_be_pushed(hub, push, run, monkeypatch):
    def refused_early(*words):
        result = push(run, REPO, "--merged")
        assert_refused(result, *words)
        assert "merging" not in result[2] and set(hub.repos) <= {REPO}

    for token, words in (
        ("", ("HF_TOKEN",)),
        ("hf_wrong", ("not accept",)),
        ("hf_reads", ("may only read",)),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        refused_early(*words)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit("main", {}, "initial commit")
    refused_early("is public", "--public")
    continued(run)
    refused_early("finish the run with the command that continued it")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (run / "metrics.jsonl").unlink()
    refused_early("HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({r"POST /api/repos/create": 409}, ("it exists already", "was not changed")),
        ({r"POST .*/branch/.*": 500}, ("failed", "created at", ": the repository; no file was uploaded")),
        ({r"GET .*/tree/v2": 500}, ("failed", "the repository and the branch v2; no file was uploaded")),
    ],
)
def test_an_error_says_what_had_been_created(hub, push, run, fault, words):
    hub.faults.update(fault)
    result = push(run, REPO, "--branch", "v2")
    assert_refused(result, *words)
    assert "another change" not in result[2]
    hub.faults.clear()
    assert push(run, REPO, "--branch", "v2")[0] == 0 and "adapter_config.json" in hub.repos[REPO].files("v2")


def test_passwords_in_the_address_of_the_hub_are_not_printed(hub, push, run, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.address.replace("://", "://user:secret@"))
    monkeypatch.setenv("HF_TOKEN", "")
    code, out, err = push(run, REPO, "--dry-run")
    assert code == 0 and "***@127.0.0.1" in out and "secret" not in out + err
    done = Uploaded(
        f"{os.environ['HF_ENDPOINT']}/a", "1", f"{os.environ['HF_ENDPOINT']}/b", True, True, [], []
    )
    monkeypatch.setattr("jaxft.weights.hf.hub_upload.upload_files", lambda *args: done)
    code, out, err = push(run, REPO)
    assert code == 0 and out.count("***@127.0.0.1") == 2 and "secret" not in out + err


def write_tiny_gguf(path, license=None):
    """A GGUF file that is a complete one, of no use as a model."""
    stated = [("add_license", license), ("add_base_model_count", 1),
              ("add_base_model_repo_url", 0, "https://huggingface.co/org/root")]  # fmt: skip
    tensors = [("token_embd.weight", np.ones((2, 32), np.float32))]
    return write_file(path, "llama", stated if license else [], tensors)


def test_gguf_files_of_several_names_share_a_repository_with_a_model(hub, push, run, tmp_path):
    q8, q4 = (write_tiny_gguf(tmp_path / f"m-{kind}.gguf", "mit") for kind in ("Q8_0", "Q4_K_M"))
    code, out, err = push(q8, REPO)
    assert code == 0 and "pushed GGUF file" in out and "short model card" in err and "warning" not in err
    assert push(q4, REPO)[0] == 0
    repo = hub.repos[REPO]
    card = repo.files()["README.md"].decode()
    assert not card_errors(card) and "license: mit" in card and "base_model: org/root" in card
    assert "library_name: gguf" in card and {q8.name, q4.name} <= set(repo.files())

    parts = {"m-Q4_K_M-00001-of-00002.gguf": b"", "m-Q4_K_M-00002-of-00002.gguf": b""}
    model = {"config.json": b"{}", "model.safetensors": b"", "README.md": b"of the model"}
    repo.commit("main", {**repo.files(), **parts, **model}, "by another")
    code, _, err = push(write_tiny_gguf(q4), REPO)
    assert code == 0 and "m-Q4_K_M.gguf states no license" in err
    assert {line for line in err.splitlines() if line.startswith("deleted")} == {
        f"deleted from the branch: {name}" for name in parts
    }
    assert repo.files() == {
        ".gitattributes": b"", **model, **{path.name: path.read_bytes() for path in (q8, q4)}
    }  # fmt: skip

    code, out, _ = push(run, REPO, "--dry-run")
    stale = {line.split()[1] for line in out.splitlines() if line.split()[0] == "deleted"}
    assert code == 0 and stale == {"config.json", "model.safetensors"} and stale < set(repo.files())
    code, _, err = push(run, REPO)
    assert code == 0 and all(f"deleted from the branch: {name}\n" in err for name in stale)
    assert not stale & set(repo.files()) and {q8.name, q4.name, *ADAPTER} <= set(repo.files())


def test_a_folder_of_gguf_files_gets_a_card_and_a_dry_run_without_the_hub_says_what_it_cannot_know(
    hub, push, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    write_tiny_gguf(tmp_path / "out" / "m.gguf")
    assert push(tmp_path / "out", REPO)[0] == 0
    assert "license: unknown" in hub.repos[REPO].files()["README.md"].decode()
    monkeypatch.setenv("HF_TOKEN", "")
    code, out, _ = push(tmp_path / "out", REPO, "--dry-run")
    assert code == 0 and "unknown without the hub and a token" in out


def test_a_card_with_metadata_that_the_hub_refuses_is_not_pushed(hub, push, run):
    text = (run / "adapter" / "README.md").read_text()
    (run / "README.md").unlink()
    (run / "adapter" / "README.md").write_text(text.replace("license: unknown", "license: my own"))
    assert_refused(push(run, REPO), "license", "no commit")
    assert not [name for name in hub.repos[REPO].files() if name != ".gitattributes"]


LOAD = """
import sys, json, numpy as np, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
adapter, merged, out = sys.argv[1:]
tokens = torch.arange(12)[None]
found = [kind.from_pretrained(name, dtype=torch.float32).eval()(tokens).logits.detach().numpy()
         for kind, name in ((AutoPeftModelForCausalLM, adapter), (AutoModelForCausalLM, merged))]
np.save(out, np.stack(found))
"""


@pytest.mark.slow
def test_peft_and_transformers_load_what_was_pushed(hub, push, run, trained, tmp_path):
    """In a process of their own, because they read HF_ENDPOINT when they are imported."""
    assert push(run, "org/adapter")[0] == 0
    assert push(run, "org/merged", "--merged", "--dtype", "float32")[0] == 0
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    argv = [sys.executable, "-c", LOAD, "org/adapter", "org/merged", str(tmp_path / "out.npy")]
    subprocess.run(argv, check=True, env=environment, cwd=trained)  # where the adapter's base is
    adapted, merged = np.load(tmp_path / "out.npy")
    assert np.abs(adapted).max() > 0.01 and np.abs(adapted - merged).max() < 1e-5
    generate = [sys.executable, str(SCRIPTS / "generate.py"), "--prompt", "what is", "--max-new", "4"]
    outs = [
        subprocess.run([*generate, "--raw", "--dtype", "float32", *where], env=environment, cwd=trained,
                       check=True, capture_output=True).stdout
        for where in (["--model", "org/merged"], ["--run", "runs/sft"])
    ]  # fmt: skip
    assert outs[0] == outs[1] and outs[0]
