"""The processes of a world, forked from one that has imported torch: importing takes each of them seconds."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable


def in_processes(calls: Iterable[Callable[[], None]]) -> None:
    """Each call in a process of its own, all at once; returns when all have ended."""
    started = [_started(call) for call in calls]
    for process in started:
        os.waitpid(process, 0)


def _started(call: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        call()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
