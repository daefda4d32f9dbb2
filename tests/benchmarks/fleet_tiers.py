"""One worker's tiers over a trace, in numbers of adapters: the real eviction policy, without bytes, time or a GPU."""

from __future__ import annotations

from collections.abc import Callable

from loramux_worker.adapters.eviction import S3Fifo

TIERS = ("gpu", "host", "disk", "store")


class Tier:
    """Room for `capacity` adapters of one size."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._policy: S3Fifo[int] = S3Fifo(capacity)
        self.here: set[int] = set()

    def __contains__(self, adapter: int) -> bool:
        return adapter in self.here

    @property
    def is_full(self) -> bool:
        return len(self.here) >= self._capacity

    def use(self, adapter: int, may_go: Callable[[int], bool] = lambda other: True) -> bool:
        """Whether it was here; it is then."""
        if adapter in self.here:
            self._policy.touch(adapter)
            return True
        while self.is_full and self.evict(may_go):
            pass  # where none may go, a little more than there is, rather than loads that wait for room
        self._policy.add(adapter, 1)
        self.here.add(adapter)
        return False

    def evict(self, may_go: Callable[[int], bool]) -> bool:
        """Let the policy choose one that may go; whether there was one."""
        victim = self._policy.evict(may_go)
        if victim is not None:
            self.here.remove(victim)
        return victim is not None

    def drop(self, adapter: int) -> None:
        """Evict it now."""
        self._policy.remove(adapter)
        self.here.remove(adapter)


class WorkerTiers:
    """Pool, host and disk of one worker; every request finds its adapter in one of them or in the store."""

    def __init__(self, gpu: int, host: int, disk: int) -> None:
        self._gpu, self._host, self._disk = Tier(gpu), Tier(host), Tier(disk)

    def find(self, adapter: int) -> str:
        """The tier that had it, as `planning.tiers` counts them; it comes into all above."""
        on_disk = self._disk.use(adapter)
        if self._gpu.use(adapter):
            return "gpu"
        return "host" if self._host.use(adapter) else "disk" if on_disk else "store"
