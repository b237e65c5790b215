"""What generation keeps of the inputs that it has read."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys (already rotated) and values of the inputs seen so far, in buffers of a fixed capacity.

    ``append`` returns views of everything stored, (B, Hkv, length, D) and (B, Hkv, length, Dv). For
    inference: the buffers are overwritten in place, so no gradient flows through them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: list[Tensor] = []

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, Hkv, n, D) and (B, Hkv, n, Dv) after what is there, on the first call's device."""
        begin, self.length = self.length, self.length + key.shape[2]
        if self.length > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, which is less than {self.length}")
        if not self._buffers:
            self._buffers = [x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key, value)]
        for buffer, new in zip(self._buffers, (key, value), strict=True):
            buffer[:, :, begin : self.length] = new
        stored_key, stored_value = (buffer[:, :, : self.length] for buffer in self._buffers)
        return stored_key, stored_value

    def clear(self) -> None:
        """Forget the contents, keep the buffers."""
        self.length = 0
