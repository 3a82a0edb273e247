"""Whole runs over several real processes on the loopback, each with some simulated devices."""

import socket
import time

from tiny_run import Place


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class ProcessGroup:
    """The processes of one run after the other in a working directory; 8 devices together."""

    def __init__(self, folder, count=2):
        self.workdirs = [Place(folder, f"process{i}") for i in range(count)]
        self.first = self.workdirs[0]
        self.processes = []

    def start(self, *argv, own=None, hook="", **environment):
        """Start the run on all processes. own: additional arguments of a process, by its index."""
        coordinator, count = f"127.0.0.1:{free_port()}", len(self.workdirs)
        self.processes = []
        for i, place in enumerate(self.workdirs):
            who = {"JAXFT_COORDINATOR": coordinator, "JAXFT_PROCESSES": str(count), "JAXFT_PROCESS": str(i)}
            arguments = [*argv, *(own or {}).get(i, ())]
            self.processes.append(
                place.start(*arguments, devices=8 // count, hook=hook, **who, **environment)
            )
        return self.processes

    def codes(self, seconds=1200):
        """Their exit codes; none may take longer."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, until - time.monotonic()))
        late = [i for i, process in enumerate(self.processes) if process.is_alive()]
        for i in late:
            self.processes[i].kill()
        assert not late, f"{late} {self.output()}"
        return [process.exitcode for process in self.processes]

    def run(self, *argv, **options):
        """A run from begin to end: the exit codes."""
        self.start(*argv, **options)
        return self.codes()

    def wait_for(self, condition, seconds=900):
        """Until the condition holds."""
        self.first.wait_for(self.processes[0], condition, seconds)

    def output(self):
        """The ends of their stdout and stderr, for the message of an assertion that fails, which is then not
        shortened.
        """
        return "\n".join(f"{x.streams}: {x.out()[-1500:]}\n{x.err()[-3000:]}" for x in self.workdirs)

    def last_line(self, number):
        """The last line of a process on stderr; one that was ended from outside has it a moment later."""
        until = time.monotonic() + 5
        while "newest checkpoint" not in (text := self.workdirs[number].err()) and time.monotonic() < until:
            time.sleep(0.05)
        return text.strip().splitlines()[-1]
