"""Devices, meshes, processes and how a run ends.

sharding.py: the table from axis names to mesh axes; the only PartitionSpecs; batches put on devices, where
    each process sends the rows of its devices
devices.py: peak speed and memory of a device; whether it has FP8 matmuls, or a CPU bfloat16 matmuls
xla_flags.py: settings of XLA and jax by platform, applied before jax starts
threads.py: work on parts of host arrays, and compilation, in several threads; freed memory returned to the
    system
launch.py: rank and coordinator from SLURM, Kubernetes, torchrun and others
processes.py: start and stop of `jax.distributed`; votes, barriers, shared errors, the watchdog
sync.py: exchanges between processes: all continue, or all raise the same error
exit.py: exit codes, signals, and the last message of a process that dies
disk.py: files that survive a power cut, temporary files of processes that may be killed
"""
