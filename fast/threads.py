"""The parts of a batch on several threads, and memory that is kept from step to step."""

import contextlib
import ctypes
import functools
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from autograd import array_module


def cores():
    """The number of cores that are ours: those we are bound to, within our groups' quotas."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(bound or 1, quota()))


@functools.cache
def quota(root=Path("/")):
    """The cores that the control groups of this process, Linux's version 2 or 1, leave to it."""
    least = math.inf
    with contextlib.suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if "cpu" not in (kinds or "cpu").split(","):
                continue
            groups = [root / "sys/fs/cgroup" / name / path[1:] for name in (kinds, kinds and "cpu")]
            for folder in (folder for group in groups for folder in (group, *group.parents)):
                for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
                    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                        text = " ".join((folder / name).read_text() for name in names)
                        time, period = map(int, text.split())
                        least = min(least, math.ceil(time / max(1, period)) if time > 0 else least)
    return least


def thread_count():
    """Threads for `parallel`: OSA_THREADS, else the cores that OPENBLAS_NUM_THREADS leaves idle."""
    asked = os.environ.get("OSA_THREADS", "")
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, cores() // int(blas)) if blas.isdecimal() and int(blas) > 0 else 1


def keep_freed_memory():
    """Lets the C library keep what is freed, instead of returning it to Linux page by page.

    Each page fetched anew is a page fault: up to half of an operator's time.  Linux and glibc only.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: below 1 GB no mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


_working = threading.local()  # .here is set in the threads of a pool


@functools.cache
def _pool(threads):
    return ThreadPoolExecutor(threads, initializer=lambda: setattr(_working, "here", True))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def batch_parts(a, target=2**19):
    """Slices of the first axis of a (..., N, n), of about `target` elements each, for `parallel`.

    They depend on the shape alone, so results do not depend on the number of threads.  Smaller
    parts would not pay: Python gives its lock away and takes it back at every call of NumPy.
    A single matrix, and any array on a GPU, is one part.
    """
    if array_module(a) is not np or a.ndim < 3 or a.size < 2 * target:
        return [...]
    size = -(-a.shape[0] // (a.size // target))
    return [slice(i, i + size) for i in range(0, a.shape[0], size)]


def parallel(f, *iterables, threads=None):
    """[f(*arguments) for arguments in zip(*iterables)], on `threads` or `thread_count()` threads;
    within one of them on that one, as waiting for others of a full pool would never end."""
    threads, jobs = threads or thread_count(), list(zip(*iterables))
    if len(jobs) == 1 or threads == 1 or hasattr(_working, "here"):
        return [f(*arguments) for arguments in jobs]
    pool = _pool(threads)
    try:
        futures = [pool.submit(f, *arguments) for arguments in jobs]
    except RuntimeError:  # Python is ending, or the system gives no more threads
        pool.shutdown(cancel_futures=True)
        _pool.cache_clear()
        return [f(*arguments) for arguments in jobs]
    return [future.result() for future in futures]
