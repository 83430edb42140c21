"""How far the host may be ahead of a device, with a device that does its work when it is waited for."""

from __future__ import annotations

from itertools import count

from adapterhub.base.pace import Pace


class Device:
    """Its queue, of which `done` steps are done."""

    def __init__(self) -> None:
        self.launched = self.done = 0
        self.most_ahead = 0

    def launch(self) -> None:
        self.launched += 1
        self.most_ahead = max(self.most_ahead, self.launched - self.done)

    def mark(self) -> Mark:
        return Mark(self)


class Mark:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._at = -1

    def record(self) -> None:
        self._at = self._device.launched

    def synchronize(self) -> None:
        self._device.done = max(self._device.done, self._at)


def test_the_host_is_never_more_than_a_few_steps_ahead_and_waits_for_none_too_many() -> None:
    device = Device()
    pace = Pace(device.mark)
    for step in count(1):
        device.launch()
        pace.step()
        assert device.done == max(0, step - 3)
        if step == 20:
            break
    assert device.most_ahead == 4
    device.launch()
    pace.finish()
    assert device.done == device.launched


def test_what_was_finished_is_not_waited_for_again() -> None:
    device = Device()
    pace = Pace(device.mark)
    device.launch()
    pace.finish()
    for _ in range(3):
        device.launch()
        pace.step()
    assert device.done == 1
