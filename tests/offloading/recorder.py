"""A transport that writes down what it is asked to do, and makes mistakes of its users visible."""

import time

POISON = 0xFF  # of every byte: NaN in float16, bfloat16, float32 and float64, −1 in int8


class Recorder:
    """Around another transport: a log of operations, and NaN in slots whose content nobody may read.

    ``lazy``: a copy happens only when it is waited for, as late as an asynchronous one may; otherwise at once, as
    early as it may. ``slow``: seconds that each copy takes more. ``fail_at``: the number of the copy that fails.
    """

    def __init__(self, inner, lazy=False, slow=0.0, fail_at=None):
        self.inner, self.device, self.lazy, self.slow, self.fail_at = inner, inner.device, lazy, slow, fail_at
        self.log = []  # operation, slot's number, first byte of the source
        self.copies = 0
        self.slots = []
        self.on_the_way = {}
        self.live = set()  # slots with content that may be read
        self.most_live = 0
        self.pinned = {}
        self.in_flight = set()  # first bytes of sources: only close() waits on the host until they were read

    def pin(self, memory):
        self.pinned[memory.data_ptr()] = memory.numel()
        self.inner.pin(memory)

    def unpin(self, memory):
        assert memory.data_ptr() not in self.in_flight, "host memory goes while it may still be copied from"
        del self.pinned[memory.data_ptr()]
        self.inner.unpin(memory)

    def allocate(self, size):
        slot = self.inner.allocate(size)
        slot.memory.fill_(POISON)
        self.inner.record(slot)
        self.slots.append(slot)
        self.log.append(("allocate", len(self.slots) - 1, size))
        return slot

    def copy(self, slot, source):
        self.copies += 1
        if self.copies == self.fail_at:
            raise OSError("the bus is broken")
        time.sleep(self.slow)
        self._log("copy", slot, source.data_ptr())
        self.in_flight.add(source.data_ptr())
        assert slot not in self.live, "a slot is written over while it is in use"
        if self.lazy:
            self.on_the_way[slot] = source
        else:
            self.inner.copy(slot, source)
        self.most_live = max(self.most_live, len({*self.live, *self.on_the_way, slot}))

    def wait(self, slot):
        self._log("wait", slot)
        if slot in self.on_the_way:
            self.inner.copy(slot, self.on_the_way.pop(slot))
        self.inner.wait(slot)
        self.live.add(slot)

    def record(self, slot):
        self._log("record", slot)
        self.live.remove(slot)
        slot.memory.fill_(POISON)
        self.inner.record(slot)

    def release(self, slot):
        self._log("release", slot)
        self.live.discard(slot)
        self.on_the_way.pop(slot, None)
        slot.memory.fill_(POISON)
        self.inner.release(slot)

    def close(self):
        self.inner.close()
        self.in_flight.clear()

    def _log(self, operation, slot, *more):
        self.log.append((operation, self.slots.index(slot), *more))

    def order(self, operation):
        """Return the sources of copies, or the slots of another operation, in order."""
        return [entry[-1] for entry in self.log if entry[0] == operation]
