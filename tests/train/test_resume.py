"""The law of resuming: 4 steps = 2 + kill + resume + 2, bit for bit, for every kind of state of a run.

A run is killed in its fourth step, after the checkpoint of step 2 and the log line of step 3. A rollout has
two steps, so this is inside the second rollout. PPO is killed again after it has sampled that rollout again.
"""

from functools import cache, partial

import dpo_place
import pytest
import reward_place
import rl_workdir
from tiny_families import FAMILIES, random_torch
from tiny_run import Place, kill_hook, write_place

ADAFACTOR = "optim.optimizer=adafactor"
SCHEDULE_FREE = ["optim.optimizer=schedule_free_adamw", "optim.schedule=constant"]
EXTRAS = ["optim.ema=0.9", "optim.skip_spikes=1,4", "optim.lora_plus=16", "neftune=5", "label_smoothing=0.1"]
BCO = "loss=jaxft.objectives.losses.reference_free_losses:bco"
ROLLOUTS = ["passes=2", "save=2", "rewards=config.py:ascii"]
MIXED = "data=rows.jsonl,more.jsonl:0.4"
PPO = ["ppo=true", "group=1", "batch=8", "full_critic=true", "scale=true", "target_kl=1e-6", "lr=2e-2"]
KINDS = {
    # name: (folder, arguments, what aux holds)
    "lora_dropout": (
        "sft",
        [
            "dropout=0.3",
            "adapter.rank_pattern=q_proj:6",
            "adapter.exclude_modules=layers.0.mlp.up_proj,",
            "adapter.modules_to_save=lm_head,norm",
            "adapter.trainable_token_indices=10,32",
            "adapter.token_head=false",
            "quant=nf4",
            "micro=2",
            "loop.log_every=3",
            "loop.eval_every=1",
            MIXED,
            *EXTRAS,
        ],
        set(),
    ),
    "full_adafactor": ("sft", ["full=true", "lr=0.001", ADAFACTOR, "general=general.jsonl"], set()),
    "dpo": (
        "pairs",
        ["reference=moving", BCO, "third=mismatched", "micro=2"],
        {"reference", "steps", "rank_error", "loss"},
    ),
    "dpo_precomputed": ("pairs", ["full=true", "reference=precomputed", "lr=0.001", *SCHEDULE_FREE], set()),
    "reward": ("reward", ["margin=ahead", "micro=2", "optim.optimizer=muon"], set()),
    "grpo": ("rollouts", ROLLOUTS, set()),
    "ppo": ("rollouts", [*ROLLOUTS, *PPO], {"kl_coef", "approx_kl"}),
    "online_dpo": ("rollouts", [*ROLLOUTS, "online=true"], set()),
    # the frozen adapter at step 0, which is the reference too, is no part of checkpoints
    "ppo_pissa": ("rollouts", [*ROLLOUTS, *PPO[:3], "adapter.init=pissa"], {"kl_coef"}),
}
QUANTISED = {
    kind: ("sft", [f"quant={kind}", "dropout=0.2", "micro=2"], set())
    for kind in ("int8", "fp8", "int4", "fp4", "affine4")
}  # nf4: with dropout above
# Rows of tiny_families.
OF_FAMILIES = {name: (name, ["dropout=0.2", "micro=2"], set()) for name in FAMILIES}
SWEEP = ["loop.eval_every=1", "reference=moving", "--over", "beta=0.1,0.4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes a working directory of each kind of data, or of a family's model, on first use."""
    write = {
        "sft": write_place,
        "pairs": dpo_place.write_pair_place,
        "reward": reward_place.write_place,
        "rollouts": rl_workdir.write_workdir,
    }

    @cache
    def place(name):
        folder = tmp_path_factory.mktemp("resume")
        write.get(name, partial(write_family_place, name))(folder)
        return Place(folder)

    return place


def write_family_place(name, folder):
    """write_place with a model of tiny_families and the vocabulary of tiny_tokenizer."""
    tokens = dict(vocab_size=320, bos_token_id=256, eos_token_id=257, pad_token_id=None)
    write_place(folder, random_torch(name, max_position_embeddings=256, **tokens))


def run_killed(place, hook, *argv, **options):
    process = place.start(*argv, hook=hook, **options)
    process.join()
    assert process.exitcode == -9, place.err()


@pytest.mark.quick_cases("lora_dropout", "dpo")
@pytest.mark.parametrize("kind", KINDS | QUANTISED | OF_FAMILIES)
def test_four_steps_are_two_a_kill_a_resume_and_two(folders, kind):
    folder, argv, aux = (KINDS | QUANTISED | OF_FAMILIES)[kind]
    place, alone, resumed = folders(folder), *(f"{x}_{kind.replace(' ', '_')}" for x in ("alone", "resumed"))
    cache = {"JAXFT_CACHE": str(place.folder / alone)}
    argv = [*argv, "steps=4", *([] if folder == "rollouts" else ["loop.save_every=2"])]
    assert place.run(*argv, f"name={alone}", **cache) == 0, place.err()
    run_killed(place, kill_hook(resumed, step=4, saved=2), *argv, f"name={resumed}", **cache)
    # Without its cached log-probs, the reference policy must be the model at step 0, not the restored one.
    cache["JAXFT_CACHE"] += "_other"
    if kind == "ppo":
        run_killed(place, kill_hook(resumed, step=3, saved=2), *argv, f"name={resumed}", **cache)
    assert place.run(*argv, f"name={resumed}", **cache) == 0, place.err()
    assert "resuming after step 2" in place.out()
    found, expected = place.results(resumed, 4), place.results(alone, 4)
    for part in expected:
        assert found[part] == expected[part], part
    if MIXED in argv:
        logged = {name for entry in expected["metrics"] for name in entry}
        assert {f"{prefix}loss/{source}" for prefix in ("", "eval_") for source in ("rows", "more")} <= logged
    assert {path.split(".")[2] for path in expected["leaves"] if path.split(".")[1] == "aux"} == aux


@pytest.mark.slow
def test_four_steps_of_a_sweep_are_two_a_kill_a_resume_and_two(folders):
    place = folders("pairs")
    argv = [*SWEEP, "steps=4", "loop.save_every=2", "--name"]
    assert place.run(*argv, "alone", script="sweep.py") == 0, place.err()
    run_killed(place, kill_hook("killed", step=4, saved=2), *argv, "killed", script="sweep.py")
    terminated = place.start(*argv, "killed", script="sweep.py")
    place.wait_for(terminated, place.loops)
    terminated.terminate()
    terminated.join()
    assert terminated.exitcode in (0, 143), place.err()  # 0: it was done before the signal came
    assert place.run(*argv, "killed", script="sweep.py") == 0, place.err()
    assert place.leaves("killed", 4) == place.leaves("alone", 4)
    for member in ("beta=0.1", "beta=0.4"):
        one, other = (place.outputs(f"{sweep}/{member}", sweep) for sweep in ("alone", "killed"))
        for part in one:
            assert one[part] == other[part], (member, part)
    assert place.run(*argv, "killed", script="sweep.py") == 0, place.err()
    assert "this sweep is finished (4 steps)" in place.out()
