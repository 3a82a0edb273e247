"""The arrays that a compiled program's collectives move between devices, before a backend rewrites them.

A CPU's backend, for example, reduces 16-bit floats in 32 bits.
"""

import contextlib
import math
import re
from dataclasses import dataclass

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxft.plan import hlo, program_bytes


@dataclass(frozen=True)
class Moved:
    """One array of a collective: its kind, dtype, shape on a device, and the operation it is part of."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    where: str

    @property
    def size(self):
        return math.prod(self.shape)


@contextlib.contextmanager
def without_cache():
    """Switch the compilation cache off: programs from the cache are not dumped, and raise no compiler
    warnings.
    """
    _use_cache(False)
    try:
        yield
    finally:
        _use_cache(True)


def _use_cache(use):
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()


def moved(lowered, folder):
    """Every collective of a lowered program after SPMD partitioning. folder: an empty one, for XLA's dump."""
    options = {
        "xla_dump_to": str(folder),
        "xla_dump_hlo_pass_re": "spmd.*",
        "xla_backend_optimization_level": 0,
    }
    with without_cache():
        lowered.compile(compiler_options=options)
    (text,) = (path.read_text() for path in folder.glob("*after_spmd-partitioning*"))
    found = []
    for one in (one for inside in hlo.parse_hlo(text).computations.values() for one in inside.values()):
        groups = program_bytes.replica_groups(one.attributes, jax.device_count())
        alone = (
            one.opcode != "collective-permute" and max(map(len, groups)) == 1
        )  # groups of one device: nothing moves
        if one.opcode in program_bytes.COLLECTIVES and not alone:
            name = re.search(r'op_name="([^"]*)"', one.attributes)
            found += [Moved(one.opcode, x.dtype, x.shape, name[1] if name else "") for x in one.arrays]
    return found
