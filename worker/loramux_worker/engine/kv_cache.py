"""Which blocks of the paged KV cache are in use: bookkeeping only, the tensors belong to the model."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out the ids `0 … num_blocks-1` of blocks that hold keys and values of `block_size` tokens each.

    Every operation costs O(1) a block. Blocks that were freed last are handed out first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them: {num_blocks=}, {block_size=}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._in_use = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    @property
    def num_token_slots(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * self.block_size

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether `allocate(num_blocks)` would succeed."""
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` blocks; their contents are whatever was left in them.

        Raises RuntimeError when there are not as many, and takes none then: ask `can_allocate` first.
        """
        keep = len(self._free) - num_blocks
        if keep < 0 or num_blocks < 0:
            raise RuntimeError(f"cannot allocate {num_blocks} blocks: {len(self._free)} are free")
        blocks = self._free[keep:]
        del self._free[keep:]
        for block in blocks:
            self._in_use[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. Raises RuntimeError at one that is not in use (freed twice, or never handed out)."""
        for block in blocks:
            if not 0 <= block < self.num_blocks or not self._in_use[block]:
                raise RuntimeError(f"block {block} is not in use: freed twice?")
            self._in_use[block] = 0
            self._free.append(block)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is either free, once, or in use. O(num_blocks)."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not any(self._in_use[block] for block in self._free), "a free block is marked as in use"
        assert sum(self._in_use) == self.num_used, "a block is neither free nor in use"
