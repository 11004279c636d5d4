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
import zlib

import numpy as np

from autograd import array_module, to_cpu
from training.options import UserError

STARTED = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")  # set by MPICH, Open MPI, Slurm


class Ranks:
    """All ranks of a run and the place of this one; without mpiexec there is one, and no MPI."""

    def __init__(self):
        self.comm, self.rank, self.size, self.neighbour, self.neighbours = None, 0, 1, 0, 1
        if not any(name in os.environ for name in STARTED):
            if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
                raise UserError("srun started several processes without MPI: srun --mpi=pmi2, "
                                "or mpiexec")  # fmt: skip
            return
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            text = f"mpiexec needs mpi4py ({error}): pip install -r requirements-mpi.txt"
            raise UserError(text) from None
        self.comm, self.rank, self.size = MPI.COMM_WORLD, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
        for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
            if int(os.environ.get(name, self.size)) != self.size:
                raise UserError(f"mpiexec started {os.environ[name]} processes and mpi4py sees "
                                f"{self.size}: they belong to two MPIs")  # fmt: skip
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

    def summed(self, gradients, grads, batch_size):
        """gradients(images, labels) of this rank's slice of a batch, and then their sum over all
        ranks: each counts as its slice's share of the batch, however unequal the slices."""
        if self.size == 1:
            return gradients

        def of_all_ranks(images, labels):
            share = len(labels) / batch_size
            loss, right = gradients(images, labels)
            grads[...] *= share
            return self.sum_up(grads, loss * share, right)

        return of_all_ranks

    def sum_up(self, grads, *values):
        """Sums `grads` (n,), in place, and the 0-d `values` over the ranks; returns those sums."""
        xp = array_module(grads)
        values = (xp.asarray(a, dtype=grads.dtype).reshape(1) for a in values)
        flat = xp.concatenate([grads, *values])
        if xp is not np and self.takes_gpu_arrays:
            xp.cuda.get_current_stream().synchronize()  # MPI does not wait for kernels
        else:
            flat = to_cpu(flat)
        total = flat.copy()
        self.comm.Allreduce(flat, total)
        total = xp.asarray(total)
        grads[...] = total[: grads.size]
        return tuple(total[grads.size :])

    def largest(self, number):
        """The largest of all ranks' numbers."""
        return max(self.comm.allgather(number)) if self.size > 1 else number

    def check_same(self, weights, digest):
        """Refuses ranks that would not begin with the same weights and images."""
        start = zlib.crc32(to_cpu(weights).tobytes(), digest)
        if self.size > 1 and len(set(self.comm.allgather(start))) > 1:
            raise UserError("the ranks do not begin with the same images and weights")
