"""Who of those that wait joins the batch."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

from loramux_worker.scheduler.allowances import Allowances
from loramux_worker.scheduler.batch import Batch, Joining
from loramux_worker.scheduler.client import Client, Lane
from loramux_worker.scheduler.config import SchedulerConfig
from loramux_worker.scheduler.fair_queue import FairQueue
from loramux_worker.scheduler.ledger import ServiceLedger
from loramux_worker.scheduler.service_meter import ServiceMeter
from loramux_worker.scheduler.step import StepDraft


class Admission:
    """Gives what is left of a step to waiting sequences, those of the least-served adapters first.

    A rider is a sequence whose adapter is in the batch already, or that needs none: it adds no ranks and needs no copy.
    For two reasons a sequence may go before the one whose turn it is:

    - It is a rider, and the other is not. This ends when riders were admitted past the other for `locality`, and holds
      only for riders that have had at most `locality` more than the other.
    - The other finds no room. No adapter more comes into the batch when some did past the other for
      `residency_quantum`; nobody is admitted who has had more than a quantum beyond the other's service. So enough of
      the batch ends at last.

    The last seats are for clients that have few (`Batch.has_seat`).
    """

    def __init__(
        self,
        config: SchedulerConfig,
        queue: FairQueue,
        batch: Batch,
        meter: ServiceMeter,
        allowances: Allowances,
        ledger: ServiceLedger,
    ) -> None:
        self._config = config
        self._queue = queue
        self._batch = batch
        self._meter = meter
        self._allowances = allowances
        self._ledger = ledger
        self._riders: list[tuple[float, int, Lane]] | None = None  # a heap; None: not made in this step
        self._without_room: list[Client] = []  # found none in this step, the least-served first
        self._passed: list[Client] = []  # by the sequence that goes next

    def fill(self, draft: StepDraft, now: float) -> None:
        """Admit until the step is full or nobody may go. Costs a bounded number of looks at those that wait."""
        self._riders = None
        self._without_room.clear()
        num_examined = 0
        while draft.tokens_left and not self._batch.is_full and (lane := self._next(num_examined)) is not None:
            if not self._batch.has_seat(lane, len(self._queue)):
                break  # nobody goes past the one whose turn it is: what comes anew has had less
            joining = self._batch.join(lane)
            if joining is Joining.JOINED:
                self._begin(lane, draft, now)
                continue
            if joining is Joining.NO_BLOCKS:
                break
            num_examined += 1
            if joining is Joining.NO_ROOM:
                self._queue.set_aside()
                self._without_room.append(lane.client)
            elif lane.key is not None:  # evicted from the host tier since it was loaded
                self._queue.park(lane.key)
        self._queue.restore()

    def _next(self, num_examined: int) -> Lane | None:
        """The lane whose head may go next; None when nobody may."""
        lane = self._queue.peek()
        if lane is None:
            return None
        self._passed = []
        if len(self._batch) and (num_examined >= self._config.max_skipped or self._is_reserved()):
            lane = self._least_rider()  # nobody else finds room, as far as one looks
        elif (rider := self._preferred_rider(lane)) is not None:
            self._passed.append(lane.client)
            lane = rider
        elif not self._batch.is_rider(lane):
            self._passed += self._without_room
        return lane if lane is not None and self._is_near_enough(lane.client) else None

    def _is_reserved(self) -> bool:
        """Whether the next room is for the first that found none."""
        return bool(self._without_room) and self._without_room[0].overtaken >= self._config.residency_quantum

    def _is_near_enough(self, client: Client) -> bool:
        """Whether it has had at most a quantum more than the first that found no room."""
        if not self._without_room or not len(self._batch):
            return True
        return client.counter <= self._without_room[0].counter + self._config.residency_quantum

    def _preferred_rider(self, lane: Lane) -> Lane | None:
        """The rider that may go before the lane whose turn it is."""
        locality, client = self._config.locality, lane.client
        if client.overtaken >= locality or self._batch.is_rider(lane):
            return None
        rider = self._least_rider()
        return rider if rider is not None and rider.client.counter <= client.counter + locality else None

    def _least_rider(self) -> Lane | None:
        """The rider of the least-served client."""
        if self._riders is None:
            lanes = self._queue.ready_lanes([*self._batch.ranks.adapters, None])
            self._riders = [(lane.client.counter, lane.client.order, lane) for lane in lanes]
            heapify(self._riders)
        riders = self._riders
        while riders:
            counter, order, lane = riders[0]
            client = lane.client
            if client.ready_lane is not lane:
                heappop(riders)
            elif (counter, order) != (client.counter, client.order):
                heapreplace(riders, (client.counter, client.order, lane))
            else:
                return lane
        return None

    def _begin(self, lane: Lane, draft: StepDraft, now: float) -> None:
        """Take the head of a lane, which has joined the batch, into the step."""
        sequence, client = lane.head, lane.client
        self._queue.admit(lane)
        for passed in self._passed:
            passed.overtaken += self._meter.most_service(sequence)
        if self._allowances.take(client, sequence, now):
            self._queue.hold(client)
        if sequence.first_scheduled_at is None:
            sequence.first_scheduled_at = now
            self._ledger.started(client, sequence, now)
        self._meter.charge_chunk(client, sequence, draft.give(sequence))
        if self._riders is not None and client.ready_lane is not None and self._batch.is_rider(client.ready_lane):
            heappush(self._riders, (client.counter, client.order, client.ready_lane))
