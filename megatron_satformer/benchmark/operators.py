"""Where the time of a step goes, by torch's profiler: operators on a CPU, kernels on a GPU."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROUNDS = 3


def seconds_by_operator(
    steps: Sequence[Callable[[], Any]], device: torch.device
) -> list[dict[str, float]]:
    """Of every step the seconds that each operator itself takes, without those that it calls.

    Args:
        steps: they take turns; a figure is the median over the turns.
        device: where they compute.
    """
    turns: list[list[dict[str, float]]] = [[] for _ in steps]
    for _ in range(ROUNDS):
        for step, taken in zip(steps, turns, strict=True):
            taken.append(_profile(step, device.type == "cuda"))
    return [
        {
            name: statistics.median(turn.get(name, 0.0) for turn in taken)
            for name in dict.fromkeys(name for turn in taken for name in turn)
        }
        for taken in turns
    ]


def _profile(step: Callable[[], Any], cuda: bool) -> dict[str, float]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        step()
    # Kernels are events of the device; operators, which started them, repeat their time.
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    return {
        event.key: getattr(event, time) / 1e6
        for event in profiler.key_averages()
        if event.device_type == kind
    }


def largest_differences(
    mine: dict[str, float], first: dict[str, float], most: int
) -> list[dict[str, Any]]:
    """The operators whose seconds differ most, as milliseconds, and those more than in `first`."""

    def size(name: str) -> tuple[float, float]:
        own, other = mine.get(name, 0.0), first.get(name, 0.0)
        return abs(own - other), own  # of the first itself: those that take longest

    names = sorted(dict.fromkeys([*mine, *first]), key=size, reverse=True)
    return [
        {
            "name": name,
            "ms": mine.get(name, 0.0) * 1e3,
            "more_ms": (mine.get(name, 0.0) - first.get(name, 0.0)) * 1e3,
        }
        for name in names[:most]
    ]
