"""Adapters for a gpu pool, and a look at what is in it."""

from __future__ import annotations

import torch

from adapter_folders import linear
from loramux_worker.adapters.gpu_pool import AdapterPool
from loramux_worker.adapters.host import HostAdapter
from loramux_worker.adapters.layout import AdapterLayout

TARGETS = (linear("q", 5, 7), linear("k", 5, 3), linear("up", 5, 11), linear("down", 11, 5))
CPU = torch.device("cpu")


def adapter(number: int, ranks: dict[int, int]) -> HostAdapter:
    """Adapter `number` with these ranks by target; its elements differ from those of every other."""
    layout = AdapterLayout.plan(sorted(ranks.items()), TARGETS)
    return HostAdapter((f"a{number}", "r"), layout, torch.arange(layout.num_elements) * 1.0 + 10_000 * number)


def sized(number: int, rank: int) -> HostAdapter:
    return adapter(number, {0: rank})  # 16 elements for each 1 of rank, at the least


def check_contents(pool: AdapterPool, held: dict[int, HostAdapter]) -> None:
    """Both ways to find the tiles lead to what was loaded: views, and the tables that kernels read."""
    for slot, loaded in held.items():
        assert pool.slot_of(loaded.key) == slot
        tiles = pool.tiles(slot)
        modules = {module.target: module for module in loaded.layout.modules}
        for target, shape in enumerate(TARGETS):
            rank = int(pool.tables.ranks[slot, target])
            if target not in modules:
                assert rank == 0
                assert tiles[target] is None
                continue
            module, tile = modules[target], tiles[target]
            assert rank == module.rank
            assert tile is not None
            expected = module.a(loaded.run), module.b(loaded.run)
            a_offset, b_offset = int(pool.tables.a_offsets[slot, target]), int(pool.tables.b_offsets[slot, target])
            through_tables = (
                pool.elements[a_offset:][: rank * shape.in_features].view(rank, -1),
                pool.elements[b_offset:][: rank * shape.out_features].view(rank, -1),
            )
            for view, table, wanted in zip(tile, through_tables, expected, strict=True):
                assert torch.equal(view.cpu(), wanted)
                assert torch.equal(table.cpu(), wanted)
