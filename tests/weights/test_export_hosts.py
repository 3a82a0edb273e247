"""The results of two real processes are those of one, byte for byte; and a full disk on one ends both."""

import errno
import subprocess

import export_place
import jax
import pytest
from processes import printed_values, start

RUN = """
from pathlib import Path
import export_place
folder, full, base = Path(sys.argv[4]), Path(sys.argv[5]), Path(sys.argv[6])
mesh = export_place.mesh()
with jax.set_mesh(mesh):
    for kind in ("adapter", "model"):
        export_place.export(folder / kind, mesh, kind, base)
    if full.is_dir():
        try:
            export_place.export(full, mesh, "model", base)
            print_value("no error")
        except OSError as error:
            print_value([error.errno])
"""


def bytes_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_a_full_disk_ends_both(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices")
    base, full = export_place.write_base(tmp_path / "base"), tmp_path / "full"
    full.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", full], capture_output=True
    ).returncode
    try:
        texts = printed_values(
            start(RUN, 2, 4, tmp_path / "two", full if mounted else tmp_path / "none", base)
        )
    finally:
        if mounted:
            subprocess.run(["umount", "-l", full], check=True)
    assert texts == [[[errno.ENOSPC]] * mounted] * 2
    mesh = export_place.mesh()
    with jax.set_mesh(mesh):
        for kind in ("adapter", "model"):
            export_place.export(tmp_path / "one" / kind, mesh, kind, base)
    alone = bytes_of(tmp_path / "one")
    assert {"adapter/adapter/adapter_model.safetensors", "model/model/model.safetensors"} <= alone.keys()
    assert bytes_of(tmp_path / "two") == alone
