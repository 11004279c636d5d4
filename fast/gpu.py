"""An NVIDIA GPU through CuPy: finding it, cuBLAS without detours, CUDA graphs."""

import contextlib
import contextvars
import ctypes
import functools
import importlib
import math

import numpy as np

import autograd
from autograd import array_module


def find_device(name="auto", card=0):
    """The array module for a device name, and a sentence that says why.

    name: "cpu", "cuda" or "auto" (the GPU if one works, else the CPU).
    `import cupy` succeeds on a machine without a driver, so a GPU is believed in only after a
    kernel and a matrix product have run on it and given the right answer.  card: which of several
    GPUs, counted round and round.
    Returns (module, reason); raises ValueError for an unknown name, RuntimeError for "cuda"
    where no GPU works.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if name == "cpu":
        return np, "cpu: asked for"
    try:
        cupy = importlib.import_module("cupy")
        cupy.cuda.Device(card % cupy.cuda.runtime.getDeviceCount()).use()
        a = cupy.arange(4, dtype=cupy.float32).reshape(2, 2) + 1  # a kernel
        if (a @ a).get().tolist() != [[7.0, 10.0], [15.0, 22.0]]:  # a matrix product
            raise RuntimeError("the GPU gave a wrong 2 x 2 matrix product")
        gpu = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        return cupy, f"cuda: {gpu} ran a kernel and a matrix product"
    except Exception as error:  # CuPy raises errors of many classes when a driver is missing
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        why = "CuPy is not installed" if isinstance(error, ImportError) else why
    if name == "cuda":
        raise RuntimeError(
            f"--device cuda: no GPU can be used ({why}); look at nvidia-smi for a card and its "
            "driver, install CuPy with 'pip install -r requirements-cuda12.txt' (or -cuda13.txt), "
            "or use --device cpu"
        )
    return np, f"cpu: no GPU can be used ({why})"


# ---------------------------------------------------------------------------------- matrix products

# The numbers 1 and 0 in each dtype, which cuBLAS reads at their addresses.
ONE_ZERO = {np.dtype(t): np.array([1, 0], t) for t in (np.float32, np.float64)}
ADDRESS = {dtype: numbers.ctypes.data for dtype, numbers in ONE_ZERO.items()}


_cublas = contextvars.ContextVar("cublas", default=None)  # other than CuPy's, see `Graph`


def product(A, B, out=None):
    """A @ B (..., n, m) for A (..., n, k) and B (..., k, m).

    On a GPU by cuBLAS directly: CuPy's own batched product first copies whatever is not
    contiguous, a transpose, a slice, an `out`, and on long sequences the copies take as long as
    the product.  Here only what BLAS cannot describe is copied.
    """
    xp = array_module(A, B)
    if xp is np or A.dtype != B.dtype or A.dtype not in ADDRESS or not A.size * B.size:
        return xp.matmul(A, B, out=out)
    C_strides = None if out is None else out.strides
    shape, sizes, a, b, c = _plan(A.shape, A.strides, B.shape, B.strides, C_strides, A.itemsize)
    if out is not None and out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if c is None or (out is not None and out.dtype != A.dtype):
        out[...] = product(A, B)
        return out
    if a is None or b is None:
        A, B = (
            M if plan else xp.ascontiguousarray(xp.broadcast_to(M, shape[:-2] + M.shape[-2:]))
            for M, plan in ((A, a), (B, b))
        )
        return product(A, B, out)
    C = xp.empty(shape, A.dtype) if out is None else out
    name = ("sgemm" if A.itemsize == 4 else "dgemm") + ("" if len(a) == 1 else "StridedBatched")
    one = ADDRESS[A.dtype]
    getattr(_cublas.get() or xp.cuda.cublas, name)(
        xp.cuda.device.get_cublas_handle(), *sizes, one, B.data.ptr, *b, A.data.ptr, *a,
        one + A.itemsize, C.data.ptr, *c,
    )  # fmt: skip
    return C


autograd.product = product  # for tensors too


@functools.lru_cache(4096)
def _plan(A_shape, A_strides, B_shape, B_strides, C_strides, itemsize):
    """The shape of C = A B and what cuBLAS wants to know of the three; None for one that it cannot
    take as it lies in memory.  cuBLAS counts by columns: what it sees is Cᵀ = BᵀAᵀ."""
    (n, k), (k_B, m) = A_shape[-2:], B_shape[-2:]
    if k != k_B:
        raise ValueError(f"product needs (..., n, k) and (..., k, m), got {A_shape} and {B_shape}")
    batch = np.broadcast_shapes(A_shape[:-2], B_shape[:-2])
    count = math.prod(batch)
    a, b = (
        _layout((*batch, *shape[-2:]), (len(batch) + 2 - len(shape)) * (0,) + tuple(
            0 if length == 1 else stride for length, stride in zip(shape[:-2], strides)
        ) + strides[-2:], itemsize)
        for shape, strides in ((A_shape, A_strides), (B_shape, B_strides))
    )  # fmt: skip
    c = (0, m, n * m) if C_strides is None else _layout((*batch, n, m), C_strides, itemsize)
    sizes = (b and b[0], a and a[0], m, n, k)
    if c and c[0]:  # cuBLAS writes row by row
        c = None
    leading = slice(1, 2) if count == 1 else slice(1, 3)
    a, b, c = (x and x[leading] for x in (a, b, c))
    return (*batch, n, m), sizes, a, b, c and (c if count == 1 else (*c, count))


def _layout(shape, strides, itemsize):
    """How BLAS would find matrices (..., n, m): whether by columns (0 or 1), the stride from row to
    row or column to column, that from matrix to matrix, in elements.  None where it could not."""
    *strides, row, column = (s // itemsize for s in strides)
    *batch, n, m = shape
    matrices = None
    for length, stride in zip(batch[::-1], strides[::-1]):
        if length > 1:
            if matrices is None:
                matrices, following = stride, stride
            if stride != following:
                return None  # not one stride from matrix to matrix
            following = stride * length
    if matrices is not None and matrices < 0:
        return None
    if (column == 1 or m == 1) and (row >= m or n == 1):
        return 0, m if n == 1 else row, matrices or 0
    if (row == 1 or n == 1) and (column >= n or m == 1):
        return 1, n if m == 1 else column, matrices or 0
    return None


# ------------------------------------------------------------------------------------- CUDA graphs


class Graph:
    """`function(*arrays)` on a GPU as a CUDA graph: recorded at the second call, replayed from then
    on, one launch for all its kernels.

    What the function does, and with which memory, must not depend on the call: it changes arrays in
    place, and what differs comes in as `arrays`, of always the same shapes and dtypes.  It returns
    arrays, of which each call gives copies.  Matrix products must be `product`s.  CuPy raises
    NotImplementedError for cuSOLVER's functions, which cannot be recorded.
    """

    def __init__(self, xp, function):
        self.xp, self.function = xp, function
        self.arrays = self.graph = None
        self.stream = xp.cuda.Stream(non_blocking=True)
        self.pool = xp.cuda.MemoryPool()  # nobody else may use the memory between two replays

    def __call__(self, *arrays):
        xp, outside = self.xp, self.xp.cuda.get_current_stream()
        form = [(a.shape, a.dtype) for a in arrays]
        if self.arrays is not None and form != [(a.shape, a.dtype) for a in self.arrays]:
            raise ValueError(f"a graph takes arrays like those of its first call, got {form}")
        self.stream.wait_event(outside.record())
        with self.stream:
            with xp.cuda.using_allocator(self.pool.malloc):
                if self.arrays is None:  # as usual: compiles, moves constants, fills the pool
                    copies = [xp.array(a) for a in arrays]
                    self.results = self.function(*copies)
                    self.arrays = copies
                else:
                    for mine, a in zip(self.arrays, arrays):
                        mine[...] = a
                    if self.graph is None:
                        self.graph, self.results = self.record()
                    self.graph.launch(self.stream)
            results = [xp.array(a) for a in self.results]  # in memory that no replay writes to
        outside.wait_event(self.stream.record())
        return results

    def record(self):
        token = _cublas.set(RecordableBlas(self.xp, self.stream))
        self.stream.begin_capture()
        try:
            results = self.function(*self.arrays)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong first is what matters
                self.stream.end_capture()
            raise
        finally:
            _cublas.reset(token)
        return self.stream.end_capture(), results


def recorded(step, xp):
    """step(chosen, offsets, *numbers) as a CUDA graph, whose numbers are arrays on the device."""
    if xp is np:
        raise ValueError("--graph: CUDA graphs need a GPU; leave it out on a CPU")
    graph = Graph(xp, step)

    def replay(chosen, offsets, *numbers):
        try:
            return graph(chosen, offsets, *(xp.full((), a, np.float32) for a in numbers))
        except NotImplementedError as error:  # CuPy's, for Cholesky factors
            what = "leave it out where osa has tokens N > 2 d_v"
            raise NotImplementedError(f"--graph: {what} ({error})") from None

    return replay


class RecordableBlas:
    """cuBLAS's own products under the names and signatures of `cupy.cuda.cublas`.

    CuPy (14) refuses to call cuBLAS while a stream is recorded; NVIDIA's documentation allows it.
    """

    def __init__(self, xp, stream):
        library = ctypes.CDLL(f"libcublas.so.{xp.cuda.runtime.runtimeGetVersion() // 1000}")
        number, long, address = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
        one = [number] * 5 + [address, address, number, address, number, address, address, number]
        many = [number] * 5 + [address, address, number, long, address, number, long]
        many += [address, address, number, long, number]

        def function(name, types):
            def call(*arguments):
                if status := f(*arguments):
                    raise RuntimeError(f"{name} failed with status {status}")

            f = getattr(library, name)
            f.argtypes = [address, *types]
            return call

        for a, A in ("sS", "dD"):
            setattr(self, f"{a}gemm", function(f"cublas{A}gemm_v2", one))
            setattr(self, f"{a}gemmStridedBatched", function(f"cublas{A}gemmStridedBatched", many))
        # The products go to the stream of CuPy's handle, until CuPy's next own call.
        set_stream = function("cublasSetStream_v2", [address])
        set_stream(xp.cuda.device.get_cublas_handle(), stream.ptr)
