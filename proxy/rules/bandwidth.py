"""How fast bodies may come, by the time of day. Pure: the moment is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo

#: The end of a day, in minutes: "24:00".
DAY_MIN = 24 * 60


@dataclass(frozen=True, slots=True)
class Hours:
    """From one minute of the day to before another, as clocks in `zone` show them, summer time included.

    Where the end is not after the start it is the next day's: 22:00 to 06:00 is the night.
    """

    start_min: int
    end_min: int
    zone: tzinfo

    def hold(self, at: float) -> bool:
        """Whether the moment (seconds since 1970) is within them."""
        moment = datetime.fromtimestamp(at, self.zone)
        minute = moment.hour * 60 + moment.minute
        if self.start_min < self.end_min:
            return self.start_min <= minute < self.end_min
        return minute >= self.start_min or minute < self.end_min


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Rates in bytes per second (None: as fast as it comes), each with the hours in which it holds (None: always).

    The first whose hours hold counts; where none does, it is as fast as it comes.
    """

    entries: tuple[tuple[Hours | None, float | None], ...] = ()

    @classmethod
    def always(cls, rate: float | None) -> Bandwidth:
        """One rate at any time."""
        return cls(((None, rate),))

    def at(self, moment: float) -> float | None:
        """The rate at a moment, in seconds since 1970; None for as fast as it comes."""
        for hours, rate in self.entries:
            if hours is None or hours.hold(moment):
                return rate
        return None


#: As fast as it comes, at any time.
UNLIMITED = Bandwidth()
