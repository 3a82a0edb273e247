"""Calibration: the rows on which a base is calibrated, its codes in the cache, and sums of the squared inputs
of linear layers.
"""

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.annotations import Fraction, PositiveInt, check_bounds, one_of
from jaxft.batch import Tokens
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing.pack import round_up
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.rows.conversation import PLAIN
from jaxft.data.rows.invalid_rows import ERROR, INVALID, invalid_lines
from jaxft.data.sft import Rows
from jaxft.data.source import Source
from jaxft.distributed import processes, sharding
from jaxft.distributed.sync import is_first
from jaxft.models.model import Model
from jaxft.nn.matmul import with_taps
from jaxft.nn.quant import QERA, Quant
from jaxft.nn.tree import Batch, Params
from jaxft.runs.run_record import CALIBRATED_JSON, write_durable_json
from jaxft.train.settings import Run
from jaxft.weights import pretrained
from jaxft.weights.edit.calibrated_base import (
    CalibratedLayer,
    CalibrationRows,
    calibrate_layers,
    codes_damage,
    codes_folder,
    codes_name,
    codes_sha256,
    layer_paths,
    write_codes,
)
from jaxft.weights.edit.lora_start import check_ranks
from jaxft.weights.hf.safetensors import read_model_json

RUN = "run"  # as quant.calibrate: the training rows of the run
FEWEST_TOKENS = 128  # of all calibration rows together

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """Calibration rows, in the formats of SFT; all of their tokens count.

    rows: a file, a folder or a hub dataset. tokens: how many are used. max_length: tokens of a packed row.
    columns, invalid, invalid_limit, format, template: as the settings data.columns etc.
    """

    rows: str
    columns: tuple[str, ...] = ()
    invalid: Annotated[str, one_of(INVALID)] = ERROR
    tokens: PositiveInt = 16384
    max_length: PositiveInt = 512
    format: str = "auto"
    invalid_limit: Fraction = DataSettings.invalid_limit
    template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS

    def __post_init__(self):
        check_bounds(self)
        if self.tokens < self.max_length:
            raise ValueError(
                f"{self.tokens} calibration tokens (--tokens, quant.calibrate_tokens) are fewer than one row "
                f"of {self.max_length} (--max-length, data.max_length); raise or lower one of them"
            )

    def open(self, tokenizer: Any, shards: int, progress: Progress) -> Source[Any]:
        """Return a source of these rows. progress: called with lines about invalid rows."""
        rows = Rows(
            self.rows, held_out=0.0, format=self.format, columns=self.columns, invalid=self.invalid,
            invalid_limit=self.invalid_limit, date=self.template.date, system=self.template.system,
            chat_template_kwargs=self.template.chat_template_kwargs, loss_on="all",
            max_length=self.max_length, batch=4,
        )  # fmt: skip
        source = rows.open(tokenizer, shards)
        for line in invalid_lines(source.info.stats.invalid):
            progress(line)
        return source


@dataclass(frozen=True)
class CalibrationPlan:
    """The inputs of a base's calibration.

    name: name of its codes in the cache, a hash of the inputs. ref: where the base comes from. quant: how it
    is quantised. rows: calibration rows as token ids. ranks: of low-rank corrections, see calibrate_layers.
    """

    name: str
    ref: str
    quant: Quant
    rows: CalibrationRows
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def coded(self) -> Quant:
        """The quantisation settings, with `codes` set to this calibration's name in the cache."""
        return replace(self.quant, codes=self.name)


def rows_of_source(source: Source[Any], tokens: int, where: str) -> CalibrationRows:
    """Return training rows of a source, from the first on, until they have `tokens` tokens or the epoch ends.

    They are the same for any mesh, data.micro, data.layout and number of epochs, which may change when a run
    resumes. Raises ValueError if an epoch has fewer than FEWEST_TOKENS. where: the setting, for errors.
    """
    rows, count = list[np.ndarray](), 0
    for step in range(math.ceil(source.info.steps_per_epoch)):
        batch = source.batch(step, None)[0]  # type: ignore[arg-type]  # of fixed rows, which read no state
        for ids in sorted(_sequences(batch), key=lambda ids: hashlib.sha256(ids.tobytes()).digest()):
            if count < tokens:
                rows.append(ids)
                count += len(ids)
        if count >= tokens:
            break
    if count < FEWEST_TOKENS:
        raise ValueError(
            f"{where}: its rows have {count} tokens, too few to calibrate; give rows with at least "
            f"{FEWEST_TOKENS}, better {tokens:,}"
        )
    return _packed(rows)


def _sequences(batch: Batch) -> Iterator[np.ndarray]:
    """Yield the token ids of each sequence in a batch; each response of a pair is one, after its prompt."""
    rows, length = math.prod(batch.ids.shape[:-1]), batch.ids.shape[-1]
    branches = np.zeros_like(batch.ids) if batch.branches is None else batch.branches
    arrays = [np.reshape(x, (rows, length)) for x in (batch.ids, batch.segments, branches)]
    for ids, segments, branch in zip(*arrays, strict=True):
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            responses = np.unique(branch[inside & (branch > 0)])
            for response in responses if len(responses) else [0]:
                yield ids[inside & ((branch == 0) | (branch == response))]


def _packed(sequences: list[np.ndarray]) -> CalibrationRows:
    """Return sequences packed into rows that are at least as long as the longest sequence."""
    width = round_up(max(map(len, sequences)), 64)
    rows, used, number = list[np.ndarray](), width, 0
    for ids in sequences:
        if used + len(ids) > width:
            rows.append(np.zeros((3, width), np.int32))
            used, number = 0, 0
        end, number = used + len(ids), number + 1
        for row, values in zip(rows[-1], (ids, number, np.arange(len(ids))), strict=True):
            row[used:end] = values
        used = end
    return CalibrationRows(*np.stack(rows, 1))


def plan_file(
    ref: str, quant: Quant, rows: Calibration, tokenizer: Any, progress: Progress
) -> CalibrationPlan:
    """Return the calibration of the model `ref` on rows of a file. Raises ValueError for rows that cannot be
    used.
    """
    calibration_rows = rows_of_source(rows.open(tokenizer, 1, progress), rows.tokens, rows.rows)
    quant = replace(quant, calibrate=rows.rows)
    return CalibrationPlan(codes_name(ref, quant, calibration_rows.digest, {}), ref, quant, calibration_rows)


def plan_run(run: Run, source: Source[Any], tokenizer: Any) -> CalibrationPlan | None:
    """Return the calibration of a run's base, None without quant.calibrate. source: the run's rows.

    Raises ValueError for rows that cannot be used.
    """
    quant = run.quant
    if quant is None or quant.calibrate is None:
        return None
    setting = f"quant.calibrate={quant.calibrate}"
    if quant.calibrate == RUN:
        if source.info.samples:
            raise ValueError(
                f"{setting}: this run samples its rows from the model, which needs its weights first; name a "
                "file with rows like them, such as quant.calibrate=rows.jsonl"
            )
        calibration_rows = rows_of_source(source, quant.calibrate_tokens, setting)
    else:
        calibration_rows = plan_file(run.weights, quant, _as_in_run(run, quant), tokenizer, print_line).rows
    ranks = dict[str, tuple[int, ...]]()
    if run.adapter and run.adapter.init == QERA:
        layouts = check_ranks(run.model.specs, run.adapter, run.model.weight_names)
        if other := layouts.keys() - set(layer_paths(run.model.specs, quant)):
            raise ValueError(
                f"adapter.init={QERA} corrects calibrated weights, and {min(other)} is not quantised; leave "
                "it out of adapter.targets"
            )
        ranks = {path: tuple(map(int, layout.ranks)) for path, layout in layouts.items()}
    name = codes_name(run.weights, quant, calibration_rows.digest, ranks)
    return CalibrationPlan(name, run.weights, quant, calibration_rows, ranks)


def _as_in_run(run: Run, quant: Quant) -> Calibration:
    """Return the settings of the calibration rows in the file quant.calibrate, read and rendered like the
    run's rows. data.columns and data.format=plain apply to them only if the run's rows are for SFT.
    """
    assert quant.calibrate is not None
    data = run.data
    rows = Calibration(
        quant.calibrate, tokens=quant.calibrate_tokens, max_length=data.max_length, invalid=data.invalid,
        invalid_limit=data.invalid_limit, template=data.template_settings,
    )  # fmt: skip
    if isinstance(data, Rows):
        rows = replace(rows, columns=data.columns, format=PLAIN if data.format == PLAIN else "auto")
    return rows


def print_line(line: str) -> None:
    """Print a line on process 0."""
    if is_first():
        print(line, flush=True)


def calibrated_codes(plan: CalibrationPlan, progress: Progress) -> None:
    """Compute calibrated codes (quantised weights) and cache them, unless they are there; every process calls
    it.

    Process 0 computes them; then each process that does not share its cache computes them too. progress:
    called with lines for the user after each layer.
    """
    begin, damage = time.perf_counter(), codes_damage(plan.name)
    known = codes_folder(plan.name).is_dir() and damage is None
    if damage is not None:
        progress(f"the calibrated base in the cache cannot be used: {damage}; it is computed again")
    for turn in (True, False):
        mine = is_first() is turn
        for line in processes.in_step(_coded_layers(plan) if mine else iter(())):
            progress(line)
    how = "from the cache" if known else f"computed in {time.perf_counter() - begin:.0f} s"
    progress(f"calibrated base: {plan.quant.kind} on {plan.rows.tokens:,} tokens, {how}")


def _coded_layers(plan: CalibrationPlan) -> Iterator[str]:
    """Compute and write calibrated codes unless the cache has them; yield a line after each layer."""
    model = pretrained.model_for(plan.ref)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.local_devices()[:1])

    def layers() -> Iterator[CalibratedLayer]:
        readers = pretrained.open_params(plan.ref, model)
        calibrated = calibrate_layers(model, readers, plan.quant, plan.rows, plan.ranks)
        while True:
            with jax.set_mesh(mesh):  # not set in the caller between layers
                layer = next(calibrated, None)
            if layer is None:
                return
            yield layer

    for number in write_codes(plan.name, plan.quant, layers):
        yield f"calibrated layer {number} of {model.config.layers}"


def calibrate_base(plan: CalibrationPlan | None, folder: Path, progress: Progress) -> None:
    """Compute the calibrated codes of a run, or find them in the cache; every process calls it.

    folder: the run's, in which their hash is recorded. Raises ValueError if the codes differ from the
    recorded ones, or between processes.
    """
    if plan is None:
        return
    path = folder / CALIBRATED_JSON
    calibrated_codes(plan, progress)
    record = {"codes": plan.name, "sha256": codes_sha256(plan.name)}
    again = f"remove the cache folder {codes_folder(plan.name)} on every machine whose base differs"
    if not processes.all_equal(record):
        raise ValueError(f"the processes have different calibrated bases; {again}, and start again")
    with processes.agreement():
        before = read_model_json(path) if path.is_file() else record
        if before["codes"] == plan.name and before != record:
            raise ValueError(
                f"{path}: the calibrated base in the cache differs from the one that this run started with, "
                "perhaps computed on another device or by another version of jax; copy the cache of that "
                f"machine, or {again}"
            )
        if is_first():
            write_durable_json(path, record)


def input_squares(
    calibration: Calibration,
    model: Model,
    tokenizer: Any,
    paths: list[str],
    load: Callable[[jax.sharding.Mesh], Params],
    progress: Progress,
) -> dict[str, Any]:
    """Return {path: sum of the squared inputs over tokens, float32 [L, I]} for the linear layers `paths`.

    load(mesh): returns the base parameters. progress: called with lines for the user.
    """
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        source = calibration.open(tokenizer, sharding.row_shards(mesh), progress)
        base = load(mesh)
        _, size, length = source.shapes[-1].ids.shape
        steps = min(source.info.steps, -(-calibration.tokens // (size * length)))
        squares = jax.jit(partial(squared_inputs, model, paths))
        total: dict[str, Any] = {}
        for step in range(steps):
            progress(f"calibrating on batch {step + 1} of {steps}")
            batch = source.batch(step, None)[0]  # type: ignore[arg-type]
            added = squares(base, jax.tree.map(lambda x: jnp.asarray(x[0]), batch))
            total = jax.tree.map(jnp.add, total, added) if total else added
        return total


def squared_inputs(model: Model, paths: Collection[str], base: Params, tokens: Tokens) -> dict[str, Any]:
    """Return {path: sum of squared inputs over tokens without padding, float32 [L, I]} of linear layers."""
    tapped_base, tapped = with_taps(base, paths)
    used = (tokens.segments > 0)[..., None]

    def squares(before: Any, after: Any) -> dict[str, Any]:
        inputs = {path: x.astype(jnp.float32) for path, x in tapped.take().items()}
        return {path: jnp.sum(jnp.where(used, jnp.square(x), 0.0), (0, 1)) for path, x in inputs.items()}

    return model.hidden(tapped_base, tokens, observe=squares)[1]
