"""Several processes or machines: data-parallel training, `mpiexec -n 4 python train.py`.

Every process, or rank, holds the whole model and takes its slice of each batch; the gradients are
summed over the ranks once per step, and all ranks make the same update.  mpi4py is imported only
in a program that mpiexec started.
"""

import atexit
import contextlib
import os
import sys
import time

import autograd as ag
from optimizers import joined

STARTED = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")  # set by MPICH, Open MPI, Slurm


class Ranks:
    """All ranks of a run and the place of this one; without mpiexec there is one, and no MPI."""

    def __init__(self):
        self.comm, self.rank, self.size, self.neighbour, self.neighbours = None, 0, 1, 0, 1
        if not any(name in os.environ for name in STARTED):
            return
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise RuntimeError(
                f"mpiexec needs mpi4py ({error}): pip install -r requirements-mpi.txt"
            ) from None
        self.comm, self.rank, self.size = MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
        here = self.comm.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks on this machine
        self.neighbour, self.neighbours = here.rank, here.size
        kinds = self.comm.Get_info().get("mpi_memory_alloc_kinds")  # MPI 4.1; "cuda" among them?
        self.takes_gpu_arrays = "cuda" in (kinds or "")
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all

    @contextlib.contextmanager
    def ending_together(self):
        """An error in one rank ends the job: the others would wait for its gradients for ever."""
        try:
            yield
        except (Exception, KeyboardInterrupt):
            if self.comm:
                atexit.register(self.comm.Abort, 1)  # after the message of whoever catches it,
                atexit.register(time.sleep, 1)  # and after mpiexec has read it, which Abort ends
                time.sleep(3 if self.rank else 0)  # what all ranks meet is told by rank 0 alone
            raise

    def take_card(self):
        """One rank per graphics card; `find_device` says so if there is none."""
        with contextlib.suppress(Exception):
            import cupy

            cupy.cuda.Device(self.neighbour % cupy.cuda.runtime.getDeviceCount()).use()

    def sum_gradients(self, g, *values):
        """Sums joined gradients g (n,), in place, and the 0-d `values` over the ranks at once.

        Each rank's loss is its slice's share of the mean over the batch, so the sum is the gradient
        of that mean, however unequal the slices.  Returns the sums of `values`.
        """
        if self.size == 1:
            return values
        xp = ag.array_module(g)
        flat = joined([g, *(xp.asarray(a, dtype=g.dtype) for a in values)])
        if xp.__name__ == "cupy" and self.takes_gpu_arrays:
            xp.cuda.get_current_stream().synchronize()  # MPI does not wait for kernels
        else:
            flat = ag.to_cpu(flat)
        total = flat.copy()
        self.comm.Allreduce(flat, total)
        total = xp.asarray(total)
        g[...] = total[: g.size]
        return tuple(total[g.size :])

    def stopped(self, stop):
        """Whether any rank has noticed a signal: all leave the loop after the same step."""
        if self.size > 1:
            number = max(self.comm.allgather(stop.signal or 0))
            if number:
                stop.signal = number
            return number > 0
        return stop.signal is not None

    def agree(self, value):
        """Whether `value` is the same in every rank."""
        return len(set(self.comm.allgather(value))) == 1
