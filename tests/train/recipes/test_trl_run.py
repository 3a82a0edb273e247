"""Five steps of DPO and IPO equal those of TRL's DPOTrainer on the same model, rows, order and optimizer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import tiny_torch, write_folder
from tiny_pairs import make_rows, write

from jaxft.data.pairs import PairRows
from jaxft.objectives import metrics
from jaxft.objectives.losses.preference_losses import dpo, ipo
from jaxft.objectives.preference import preference
from jaxft.optim import schedules
from jaxft.optim.optimizer import Optim
from jaxft.train import programs
from jaxft.train.settings import Run
from jaxft.weights import pretrained

datasets = pytest.importorskip("datasets")
torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

BATCH, STEPS, LR, EPS = 4, 5, 1e-3, 1e-6
NAMES = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy",
    "mean_token_accuracy", "grad_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    write_folder(folder / "base", tiny_torch())
    return folder


def ours(folder, rows, loss):
    """(metrics of every step, indices of the rows in training order)."""
    write(folder / "rows.jsonl", rows)
    base = str(folder / "base")
    run = Run(
        "trl", base, pretrained.model_for(base, dtype=jnp.float32), partial(preference, loss=loss),
        PairRows(str(folder / "rows.jsonl"), held_out="none", batch=BATCH, max_length=128), adapter=None,
        optim=Optim(lr=LR, schedule=schedules.constant_schedule, warmup=0.0, eps=EPS),
    )  # fmt: skip
    source = run.data.open(pretrained.load_tokenizer(base), cache=folder / "cache")
    p = programs.build(run, STEPS, jax.devices()[:1])
    found, order = [], []
    with jax.set_mesh(p.mesh):
        state, frozen = programs.start(run, p, None)
        for step in range(STEPS):
            batch = source.batch(step)[0]
            order += [int(i) for i in batch.index.ravel() if i >= 0]
            state, numbers = p.train_step(state, frozen, batch)
            found.append(metrics.as_floats(numbers))
    return found, order


def theirs(folder, rows, loss_type):
    """TRL's loss and metrics of every step, on the rows in this order."""
    losses, logged = [], []

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def log(self, logs, *args, **kwargs):
            logged.append({**logs, **{name: np.mean(x) for name, x in self._metrics["train"].items()}})
            return super().log(logs, *args, **kwargs)

    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    data = datasets.Dataset.from_list(
        [
            {
                "prompt": said("user", r["prompt"]),
                **{k: said("assistant", r[k]) for k in ("chosen", "rejected")},
            }
            for r in rows
        ]
    )
    args = trl.DPOConfig(
        str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=LR,
        adam_epsilon=EPS, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True, report_to="none",
        save_strategy="no", max_length=128, beta=0.1, loss_type=[loss_type], disable_tqdm=True,
        optim="adamw_torch",
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    tokenizer = pretrained.load_tokenizer(str(folder / "base"))
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(str(folder / "base"), dtype=torch.float32)
    InOrder(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()
    return [{**line, "loss": loss} for line, loss in zip(logged, losses)]


@pytest.mark.quick_cases("dpo-sigmoid")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss, loss_type", [(dpo, "sigmoid"), (ipo, "ipo")])
def test_five_steps_equal_those_of_trl(folder, loss, loss_type):
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in make_rows(BATCH * STEPS)]
    found, order = ours(folder, rows, loss)
    assert sorted(order) == list(range(BATCH * STEPS))
    expected = theirs(folder, [rows[i] for i in order], loss_type)
    losses = [line["loss"] for line in found]
    assert max(losses) - min(losses) > 0.1 and found[0]["rewards/margins"] == 0 != found[4]["rewards/margins"]
    assert "rewards/accuracies" not in found[0] and expected[0]["rewards/accuracies"] == 0  # ties
    for line, other in zip(found, expected, strict=True):
        for name in NAMES if line is not found[0] else set(NAMES) - {"rewards/accuracies"}:
            np.testing.assert_allclose(line[name], other[name], rtol=2e-5, atol=2e-5, err_msg=name)
