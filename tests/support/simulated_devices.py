"""Environment of tests: simulated CPU devices, and programs that compile quickly and run slowly."""

from jaxft.distributed import xla_flags

# Most of the time of the tests is compilation. Without LLVM's optimisations, and with the older emitters of
# fused operations, tests/nn/test_fused_backward.py takes 77 seconds instead of 135 with an empty compilation
# cache. Values differ by rounding. A program in one piece, rather than in one for each thread, compiles in a
# fifth less of a core's time.
QUICK_COMPILE = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def flags(devices: int, given: str = "") -> str:
    """XLA_FLAGS for so many simulated devices; flags that are given keep their values."""
    quick = [
        f"--{name}={value}"
        for name, value in QUICK_COMPILE.items()
        if name not in given and xla_flags.is_known("XLA_FLAGS", name)
    ]
    return " ".join([given, *quick, f"--xla_force_host_platform_device_count={devices}"]).strip()


def environment(devices: int, given: str = "") -> dict[str, str]:
    """Environment variables of a process with so many simulated devices. given: flags that stay.

    XLA runs collective operations of all devices on one pool of threads, as many as devices or cores, and a
    thread waits in one until its partners join. A device can wait in several at once, so the pool can run out
    before the last partner has a thread, which ends the process after 40 seconds; hence more threads.
    """
    threads = str(8 * devices) if devices > 1 else ""  # empty: as many as cores
    return {"XLA_FLAGS": flags(devices, given), "PJRT_NPROC": threads}
