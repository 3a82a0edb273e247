"""Durations as text."""


def time_in_words(seconds: float) -> str:
    """A time in words: 4.2 s, 3 min 27 s, 1 h 03 min, from three days up 4.5 days."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 72:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def clock_time(seconds: float) -> str:
    """3:07, or 1:03:07 from an hour up."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
