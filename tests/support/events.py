"""What a run reports, as plain values."""


def collector(events):
    """A function that takes a run's events and adds each to a list, as a dict with its type."""
    return lambda event: events.append({"type": event.type, **fields_of(event)})


def pairs(events):
    """A function that takes a run's events and adds each to a list, as (type, fields)."""
    return lambda event: events.append((event.type, fields_of(event)))


def fields_of(event):
    """An event's fields, its samples included."""
    return event.model_dump(mode="json", exclude={"type", "time"})
