"""All of a server's shared memory in one object, with its life: made with the server, opened with its port, closed last."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Sequence
from typing import Final

from lossgrad_server.shared_memory.cuda import CudaAndSystemRegions
from lossgrad_server.shared_memory.handover import Handover
from lossgrad_server.shared_memory.peers import is_this_user, owner_of
from lossgrad_server.shared_memory.rules import MAX_PART_BYTES, Budget
from lossgrad_server.shared_memory.segments import IDLE_SECONDS, Segments, why_impossible
from lossgrad_server.shared_memory.system import SystemRegions

logger = logging.getLogger(__name__)

_MAX_REGIONS: Final = 1024
_SWEEP_SECONDS: Final = IDLE_SECONDS / 10


class SharedMemory:
    """What a server shares with callers on its machine."""

    def __init__(self, max_bytes: int, prefixes: Sequence[str], *, allows_cuda: bool = False) -> None:
        """`prefixes` are those of system regions; `allows_cuda` lets callers register GPU memory, too."""
        # A region takes a descriptor; half of all that this process may have are left to connections.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        is_unlimited = descriptors == resource.RLIM_INFINITY
        budget = Budget(_MAX_REGIONS if is_unlimited else min(_MAX_REGIONS, descriptors // 2), max_bytes)
        self._max_region_bytes = min(max_bytes, MAX_PART_BYTES)
        self._address, self._port = "", 0
        self.segments = Segments(budget)
        self.system_regions = self._regions(budget, prefixes, allows_cuda=allows_cuda)
        self._handover: Handover | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def start(self, address: str, port: int) -> None:
        """Begin to share, once it is known where the server listens: `address` as gRPC writes it, and the port."""
        self._address, self._port = address, port
        reason = why_impossible()
        if not reason:
            handover = Handover(self.segments, address)
            try:
                handover.start()
            except OSError as error:
                reason = f"its socket cannot be opened: {error.strerror}"
            else:
                self._handover = handover
                self._sweeper = asyncio.create_task(self._give_up_unused())
        if reason:
            logger.warning("The SDK will share no memory with this server: %s", reason)

    def offer(self, peer: str) -> tuple[str, int] | None:
        """Return where a caller gets memory, and the most bytes of a region; None for a caller on another machine."""
        if self._handover is None or owner_of(peer, self._port) is None:
            return None
        return self._handover.address, self._max_region_bytes

    def state(self) -> list[tuple[str, int, int]]:
        """Return what is shared, for metrics: of each kind its name, how many regions, how many bytes."""
        regions = self.system_regions
        state = [
            ("segment", self.segments.count, self.segments.byte_count),
            ("system", regions.count, regions.byte_count),
        ]
        if isinstance(regions, CudaAndSystemRegions):
            state.append(("cuda", regions.cuda_count, regions.cuda_byte_count))
        return state

    def close(self) -> None:
        """Let go of everything. Call it once no request is left."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._handover is not None:
            self._handover.close()
        self.segments.close()
        self.system_regions.close()

    def _regions(self, budget: Budget, prefixes: Sequence[str], *, allows_cuda: bool) -> SystemRegions:
        def identify(peer: str) -> str | None:
            return owner_of(peer, self._port)

        if not allows_cuda:
            return SystemRegions(budget, prefixes, identify)
        return CudaAndSystemRegions(budget, prefixes, identify, lambda owner: is_this_user(owner, self._address))

    async def _give_up_unused(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            if count := self.segments.give_up_unused():
                logger.info("Gave up %s regions of shared memory that nobody used", count)
