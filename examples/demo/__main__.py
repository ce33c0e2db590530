"""`make demo`: lossgrad on real data, held against torch. Exits 1 if any number disagrees. Under half a minute.

1. Starts `lossgrad-server` as a process of its own (server_process.py).
2. Evaluates two models' real predictions in batches, six losses in one round trip each (evaluate.py).
3. Trains a network with gradients that come from the server only (train.py).
4. Sends bursts of small requests and reads latencies and batch sizes from the metrics endpoint (burst.py).
5. Stops the server with SIGTERM.
"""

from __future__ import annotations

import sys
import time

import torch

import lossgrad
from examples.demo import burst, evaluate, show, train
from examples.demo.server_process import ServerProcess


def main() -> int:
    """Run the demo; return the exit code."""
    started = time.perf_counter()
    wrong: list[str] = []
    torch.set_num_threads(1)  # the network is small, and the server wants the cores
    with ServerProcess() as server:
        with lossgrad.LossClient(server.target) as client:
            show.server(server, client.info())

            show.heading("Real predictions, evaluated remotely and by torch here")
            datasets = (evaluate.diabetes(), evaluate.digits())
            for data in datasets:
                rows = evaluate.evaluate(client, data)
                show.evaluation(data, rows)
                wrong += evaluate.disagreements(data, rows)

            show.heading("A network trained with the server's gradients, and again with torch's")
            with show.progress("training twice", 2 * train.EPOCHS) as advance:
                remote = train.train(lossgrad.nn.SmoothL1Loss(beta=train.BETA, client=client), advance)
                local = train.train(train.local_criterion(), advance)
            show.training(remote, local)
            wrong += train.disagreements(remote, local)

        show.heading("Bursts of small requests, as the metrics endpoint saw them")
        pairs = burst.pairs_of(datasets[1].prediction, datasets[1].target, count=2400)
        with show.progress("sending", len(burst.WAYS)) as advance:
            bursts = burst.run(server.target, server.metrics_url, pairs, advance)
        show.bursts(bursts)
        wrong += burst.disagreements(bursts, pairs)

        if exit_code := server.stop():
            wrong.append(f"the server ended with exit code {exit_code} instead of 0; it said:\n{server.output}")
    show.verdict(exit_code, wrong, time.perf_counter() - started)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
