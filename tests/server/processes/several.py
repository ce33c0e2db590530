"""A lossgrad-server with several processes, as tests see it: which they are, and how many connections each has."""

from __future__ import annotations

from pathlib import Path

from tests.prometheus import fetch
from tests.server.program import Program
from tests.server.scraping import Scrape


class SeveralProgram(Program):
    """A running lossgrad-server with several processes, on free ports."""

    def __init__(self, count: int = 2, *arguments: str, **environment: str) -> None:
        flags = (f"--processes={count}", f"--threads={count}", "--port=0", "--metrics-port=0")
        super().__init__(*flags, *arguments, **environment)

    def addresses(self) -> tuple[str, str]:
        """Wait until it serves; return where, and where its metrics are."""
        grpc_address, _, metrics_address = self.ready_line().partition(", metrics ")
        return grpc_address.removeprefix("lossgrad-server ready on "), metrics_address

    def children(self) -> list[int]:
        """Return the ids of its processes, the parent's left out."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def scrape(metrics_address: str) -> Scrape:
    """Return what its metrics show."""
    return Scrape(fetch(metrics_address))


def total(scraped: Scrape, name: str, **labels: str) -> float:
    """Return the sum of a name's series that have these labels."""
    return sum(value for own, value in scraped.of(name).items() if labels.items() <= dict(own).items())


def is_there(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
