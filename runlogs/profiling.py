"""Traces of torch.profiler -> what took how long, in us as in the traces."""

import json
import math
from typing import NamedTuple

from runlogs.parsing import open_file


class Event(NamedTuple):
    """Something of a trace that took time. `kind`: cpu_op, kernel, gpu_memcpy, user_annotation, ..."""

    name: str
    kind: str
    start: float
    end: float
    thread: str  # or stream of a GPU


def read_events(path):
    """Events of a trace that have a duration. ValueError if it is damaged."""
    try:
        with open_file(path) as file:
            found = json.loads(file.read())["traceEvents"]
        return [Event(str(e["name"]), str(e.get("cat")), *span_of(e), f"{e.get('tid')}")
                for e in found if e.get("ph") == "X" and e.get("dur", 0) > 0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        what = "damaged, or cut off" if isinstance(error, ValueError) else "no trace of torch.profiler"
        raise ValueError(f"'{path}' is {what}: train again with --enable_profiling") from error


def span_of(event):
    """(start, end) of an event. OverflowError if it is not between -1e18 and 1e18, or no number."""
    start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
    if not -1e18 < start <= end < 1e18:
        raise OverflowError
    return start, end


def covered(events):
    """Length of the union of the events' times."""
    total, reach = 0.0, -math.inf
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, reach))
        reach = max(reach, event.end)
    return total


def length(events):
    """Time from the first start to the last end."""
    return max(e.end for e in events) - min(e.start for e in events)


def self_times(events):
    """{name: [time without that of the events inside, calls]}; on a thread events nest."""
    found, threads = {}, {}
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        open_ones = threads.setdefault(event.thread, [])
        while open_ones and open_ones[-1].end <= event.start:
            open_ones.pop()
        if open_ones:
            outer = open_ones[-1]
            found[outer.name][0] -= min(outer.end, event.end) - event.start
        own = found.setdefault(event.name, [0.0, 0])
        own[0] += event.end - event.start
        own[1] += 1
        open_ones.append(event)
    return found


def trace_numbers(path):
    """What a trace says. Operations: a GPU's kernels, or else a CPU's operators and what gloo does.
    Idle: share of the time from the first to the last thing on a GPU with nothing on it, or None."""
    events = read_events(path)
    device = [e for e in events if e.kind in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = [e for e in device if e.kind == "kernel"]
    on_cpu = [e for e in events if e.kind == "cpu_op" or e.name.startswith(("aten::", "gloo:"))]
    pool = kernels or on_cpu
    talk = [e for e in pool if e.name.startswith(("nccl", "gloo:"))]
    work = [e for e in pool if e.name.startswith("aten::")]
    work = [e for e in kernels if not e.name.startswith("nccl")] if kernels else work
    steps = [e for e in events if e.name.startswith("ProfilerStep")]
    steps = [e for e in steps if e.kind == "gpu_user_annotation"] or steps
    operations = [[name, *own] for name, own in self_times(pool).items()]
    return {
        "trace": str(path),
        "kind": "kernels" if kernels else "CPU operations",
        "steps": len(steps),
        "step_us": length(steps) / len(steps) if steps else None,
        "communication_us": covered(talk),
        "beside_us": covered(talk) + covered(work) - covered(talk + work),
        "idle": 1 - covered(device) / length(device) if device else None,
        "operations": sorted(operations, key=lambda own: -own[1]),
    }
