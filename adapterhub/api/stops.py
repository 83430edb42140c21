"""Stop strings: where a text ends before it is over."""

from __future__ import annotations


class StopStrings:
    """Ends a text before the first of `stops`, and holds back what may still become one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""
        self.length = 0  # characters so far, with those that are held back
        self.hit = False

    def push(self, text: str, *, last: bool = False) -> str:
        """What of the text so far can be shown now; all of it when nothing can come after the `last`."""
        self._held += text
        self.length += len(text)
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        self.hit = bool(found)
        keep = 0 if last else max((self._overlap(stop) for stop in self._stops), default=0)
        end = min(found) if found else len(self._held) - keep
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def shows(self, offset: int) -> bool:
        """Whether what comes after so many characters was shown, or would be if there were any."""
        return not self._held or offset < self.length - len(self._held)

    def _overlap(self, stop: str) -> int:
        """How much of the end of the held text is a beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
