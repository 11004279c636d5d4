"""A stand-in for CuPy that runs on the CPU and refuses what CuPy refuses.

`import refusing as xp` gives a module with NumPy's functions over an array class of its own, so
code that reads `array_module` from its arrays runs on it unchanged.  As with CuPy 14:

- an array never turns into a NumPy array by itself, and never mixes with one: only `asarray` and
  `array` bring data in, only `.get()`, `.item()` and `.tolist()` bring it out;
- a reduction is a 0-d array, which is no index, no range bound and no iterable; `float(x)`,
  `int(x)` and `bool(x)` wait for the device;
- names that CuPy does not have are missing, and `linalg.solve` does not broadcast batches.

It is stricter than CuPy where that helps: NumPy's own functions and `random` are refused (weights
and batches are drawn on the CPU).  `counts` counts transfers and waits; `operations` the kernels
that CuPy would launch, by a reading of its source (see `_count`), and the arithmetic of products.
`cuda.cublas` emulates the functions of cuBLAS that the project calls, on the memory at the
addresses it is given.  While a stream records, nothing may be moved or waited for; what was done
is undone at the end, and the graph repeats it on the same memory.
"""

import contextlib as _contextlib
import ctypes as _ctypes
import types as _types

import numpy as _np

_tape = None  # while a stream records: [(what to repeat, the array it changes, its numbers before)]
counts = {"to_device": 0, "to_host": 0, "waits": 0}
operations = {"count": 0, "flops": 0}
VIEWS = frozenset(
    """ascontiguousarray asarray broadcast_to diagonal empty empty_like expand_dims moveaxis ravel
    reshape result_type split squeeze swapaxes transpose""".split()
)

# What CuPy refuses while a stream records, or could not be recorded: besides, all of `linalg`.
UNRECORDED = frozenset(
    "matmul __matmul__ dot tensordot einsum nonzero unique argwhere rfft2 irfft2".split()
)

# Public callables and types of NumPy 2.4 that CuPy 14.0.1 lacks, found by comparing dir() of both.
MISSING = frozenset(
    """asmatrix block bmat busday_count busday_offset busdaycalendar bytes_ char character
    clongdouble complex256 ctypeslib cumulative_prod cumulative_sum datetime64 datetime_as_string
    datetime_data dtypes einsum_path emath errstate flexible float128 frompyfunc fromregex
    geomspace get_include getbufsize geterr geterrcall histogram_bin_edges info insert is_busday
    isdtype isnat longdouble ma matrix matrix_transpose matvec memmap nanpercentile nanquantile
    ndenumerate nditer nested_iters object_ polyder polydiv polyint rec recarray record setbufsize
    seterr seterrcall show_runtime spacing str_ strings test timedelta64 unstack vecdot vecmat
    void""".split()
)
MISSING_LINALG = frozenset(
    """diagonal matmul matrix_norm matrix_transpose multi_dot outer svdvals tensordot test trace
    vecdot vector_norm""".split()
)
MISSING_METHODS = frozenset("byteswap ctypes getfield resize setfield setflags to_device".split())


def _unwrap(x):
    """The NumPy arrays inside the arguments of a call; refuses NumPy arrays from outside."""
    if isinstance(x, Array):
        return x._a
    if isinstance(x, _np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: call asarray first")
    if isinstance(x, (list, tuple)):
        return type(x)(_unwrap(i) for i in x)
    return x


def _wrap(x):
    if isinstance(x, (_np.ndarray, _np.generic)):
        return Array(_np.asarray(x))
    return tuple(_wrap(i) for i in x) if isinstance(x, (list, tuple)) else x


def _call(function, self=None):
    name = getattr(function, "__name__", "")

    def call(*args, **kwargs):
        if name in UNRECORDED:
            _refuse_in_a_recording(f"{name} calls a library, or waits")
        out = kwargs.get("out")
        changed = args[0] if name == "copyto" else out
        kwargs = {k: _unwrap(v) for k, v in kwargs.items()}
        args = _unwrap(args)
        before = None if changed is None or _tape is None else changed._a.copy()
        result = function(*args, **kwargs)
        _count(name, args if self is None else (self, *args), result, out)
        result = _wrap(result) if out is None else out
        _record(lambda: _assign(result, function(*args, **kwargs)), changed, before)
        return result

    return call


def _record(repeat, changed=None, before=None):
    if _tape is not None:
        _tape.append((repeat, changed, before))


def _assign(arrays, results):
    """The same operation as before, into the memory that it wrote to then."""
    if isinstance(arrays, (list, tuple)):
        for a, result in zip(arrays, results):
            _assign(a, result)
    elif isinstance(arrays, Array) and not _np.may_share_memory(arrays._a, results):
        arrays._a[...] = results  # else a view, which is as it was


def _count(name, args, result, out=None):
    """Adds the kernels that CuPy 14 would launch for a call, as its source has them.

    A view takes none, a copy that NumPy too would have to make one.  A batched product copies
    operands that are not contiguous, and takes three tables of pointers where it broadcasts; a
    concatenation copies up to eight arrays one by one, and moves tables of their addresses there
    for more.
    """
    kernels = 1
    if name in VIEWS:
        fresh = isinstance(result, _np.ndarray) and not name.startswith("empty")
        kernels = fresh and not _np.may_share_memory(result, args[0])
    elif name in ("matmul", "__matmul__"):
        a, b = args[:2]
        operations["flops"] += 2 * result.size * a.shape[-1]
        if result.ndim > 2:
            kernels += sum(not m.flags.c_contiguous for m in (a, b))
            kernels += 3 * (result.ndim - 2) * (a.shape[:-2] != b.shape[:-2])
        else:
            kernels += sum(not (m.flags.c_contiguous or m.flags.f_contiguous) for m in (a, b))
        kernels += out is not None and not out._a.flags.c_contiguous
    elif name == "concatenate":
        kernels = len(args[0]) if len(args[0]) <= 8 else 1
        if len(args[0]) > 8:
            _refuse_in_a_recording("moves tables of addresses to the device")
            counts["to_device"] += 3
    elif name == "cholesky":
        kernels = 3 + result.ndim - 2  # a copy, pointers, the factorisation, the lower triangle
    elif name == "inv":
        kernels = 6  # a copy, two tables of pointers, the factorisation, the inverse in two
    operations["count"] += int(kernels)


def _index(index):
    """Array indices unwrapped; a 0-d array is no index, alone or as a bound of a slice."""
    parts = index if isinstance(index, tuple) else (index,)
    for i in parts:
        bounds = (i.start, i.stop, i.step) if isinstance(i, slice) else (i,)
        if any(isinstance(b, Array) and b.ndim == 0 for b in bounds):
            raise TypeError("a 0-d array cannot be an index: it lives on the device")
    return _unwrap(index)


class Array:
    __slots__ = ("_a",)
    __hash__ = None
    __array_ufunc__ = None  # `numpy_array + x` comes to __radd__, which refuses it

    def __init__(self, a):
        self._a = a

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed: call get()")

    def __array_function__(self, function, *args):
        raise TypeError(f"numpy.{function.__name__} on a device array: use its own module")

    def __getattr__(self, name):
        if name.startswith("_") or name in MISSING_METHODS:
            raise AttributeError(f"CuPy arrays have no attribute {name!r}")
        value = getattr(self._a, name)
        return _call(value, self._a) if callable(value) else _wrap_property(name, value)

    dtype = property(lambda self: self._a.dtype)
    shape = property(lambda self: self._a.shape)

    @property
    def data(self):
        return _types.SimpleNamespace(ptr=self._a.ctypes.data)

    def __getitem__(self, index):
        index = _index(index)
        out = self._a[index]
        if isinstance(out, _np.generic):  # a 0-d view, where NumPy gives a scalar
            out = self._a[(*index, ...) if isinstance(index, tuple) else (index, ...)]
        out = Array(out)
        _record(lambda: _assign(out, self._a[index]))
        return out

    def __setitem__(self, index, value):
        operations["count"] += 1
        index, value = _index(index), _unwrap(value)
        _record(
            lambda: self._a.__setitem__(index, value), self, _tape is not None and self._a.copy()
        )
        self._a[index] = value

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"refusing.{self._a!r}"

    def _scalar(self):
        if self.ndim:
            raise TypeError(f"only 0-d arrays become Python scalars, got shape {self.shape}")
        _refuse_in_a_recording("waits for the device")
        counts["waits"] += 1
        return self._a[()]

    def get(self):
        _refuse_in_a_recording("moves an array to the host")
        counts["to_host"] += 1
        return self._a.copy()


def _wrap_property(name, value):
    return _wrap(value) if name in ("T", "real", "imag") else value


def _method(name, inplace=False):
    def method(self, other):
        if not isinstance(other, Array) and getattr(other, "__array_ufunc__", 0) is None:
            return NotImplemented  # an object that asks for its own reflected operator
        if name in UNRECORDED:
            _refuse_in_a_recording("@ calls cuBLAS")
        operation, other = getattr(self._a, name), _unwrap(other)
        before = self._a.copy() if inplace and _tape is not None else None
        result = operation(other)
        _count(name, (self._a, other), result)
        if inplace:
            _record(lambda: operation(other), self, before)
            return self
        result = _wrap(result)
        _record(lambda: _assign(result, operation(other)))
        return result

    return method


for _name in "add sub mul truediv floordiv mod pow matmul and or xor".split():
    setattr(Array, f"__{_name}__", _method(f"__{_name}__"))
    setattr(Array, f"__r{_name}__", _method(f"__r{_name}__"))
    if _name != "matmul":  # CuPy has no `@=` of its own: `x @= y` binds x to a new array
        setattr(Array, f"__i{_name}__", _method(f"__i{_name}__", inplace=True))
for _kind in (float, int, bool):
    setattr(Array, f"__{_kind.__name__}__", lambda self, _kind=_kind: _kind(self._scalar()))
for _name in ("item", "tolist"):
    setattr(Array, _name, lambda self, *args, _name=_name: getattr(self.get(), _name)(*args))
for _name in "lt le gt ge eq ne".split():
    setattr(Array, f"__{_name}__", _method(f"__{_name}__"))
_ALONE = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}
for _name in _ALONE:
    setattr(Array, f"__{_name}__", lambda self, _n=_name: _call(getattr(_np, _ALONE[_n]))(self))


def array(a, dtype=None, copy=True):
    """An array of the device; from the host, a transfer."""
    if not isinstance(a, Array):
        _refuse_in_a_recording("moves an array to the device")
        counts["to_device"] += 1
        a = Array(_np.array(a if isinstance(a, _np.ndarray) else _unwrap(a), dtype=dtype))
        if a.dtype.kind not in "biufc":
            raise ValueError(f"Unsupported dtype {a.dtype}")
        return a
    if not copy and dtype in (None, a.dtype):
        return a
    operations["count"] += 1
    result = Array(_np.array(a._a, dtype=dtype))
    _record(lambda: _assign(result, a._a))
    return result


def _refuse_in_a_recording(what, error=RuntimeError):
    if _tape is not None:
        raise error(f"operation not permitted when stream is capturing: {what}")


def asarray(a, dtype=None):
    return array(a, dtype, copy=False)


def _lookup(module, missing, name):
    value = None if name.startswith("_") or name in missing else getattr(module, name, None)
    if value is None and name != "newaxis" or isinstance(value, _types.ModuleType):
        raise AttributeError(f"no {name!r} in CuPy, or not offered by this stand-in")
    return _call(value) if callable(value) and not isinstance(value, type) else value


class _Linalg:
    def __getattr__(self, name):
        _refuse_in_a_recording(f"linalg.{name} calls cuSOLVER", NotImplementedError)
        return _lookup(_np.linalg, MISSING_LINALG, name)

    def solve(self, a, b):
        if b.ndim != 1 and a.shape[:-1] != b.shape[:-1]:
            raise ValueError(f"solve does not broadcast batches: {a.shape} and {b.shape}")
        return _call(_np.linalg.solve)(a, b)


def _memory(address, count, dtype):
    """The numbers at an address."""
    return _np.frombuffer((_ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)


def _gemm(dtype):
    def matrices(address, rows, columns, ld, stride, count):
        """`count` matrices, column by column."""
        assert ld >= rows, f"leading dimension {ld} for {rows} rows"
        memory = _memory(address, (count - 1) * stride + (columns - 1) * ld + rows, dtype)
        strides = [i * dtype.itemsize for i in (stride, 1, ld)]
        return _np.lib.stride_tricks.as_strided(memory, (count, rows, columns), strides)

    def gemm(
        handle, transa, transb, m, n, k, alpha, A, lda, strideA, B, ldb, strideB, beta, C, ldc,
        strideC, count,
    ):  # fmt: skip
        """C ← op(A) op(B), as cublas<t>gemmStridedBatched has it with α = 1, β = 0."""
        a = matrices(A, *((k, m) if transa else (m, k)), lda, strideA, count)
        b = matrices(B, *((n, k) if transb else (k, n)), ldb, strideB, count)
        assert handle == "handle"
        for x in (a, b):
            assert not _np.shares_memory(matrices(C, m, n, ldc, strideC, count), x)
        assert _memory(alpha, 1, dtype) == 1 and _memory(beta, 1, dtype) == 0
        operations["count"] += 1
        operations["flops"] += 2 * count * m * n * k
        left, right = a.swapaxes(-1, -2) if transa else a, b.swapaxes(-1, -2) if transb else b
        c = matrices(C, m, n, ldc, strideC, count)
        _record(lambda: _np.matmul(left, right, out=c), Array(c), c.copy())
        c[...] = left @ right

    def single(handle, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc):
        gemm(handle, transa, transb, m, n, k, alpha, A, lda, 0, B, ldb, 0, beta, C, ldc, 0, 1)

    return single, gemm


class _Stream(_contextlib.nullcontext):
    """Records like a CUDA stream: what is done meanwhile is undone, and repeated by the graph."""

    ptr = 0

    def __init__(self, non_blocking=False):
        super().__init__()

    def record(self):
        return "event"

    def wait_event(self, event):
        assert event == "event"

    def begin_capture(self):
        global _tape
        _tape = []

    def end_capture(self):
        global _tape
        tape, _tape = _tape, None
        for _, changed, before in reversed(tape):
            if changed is not None:
                changed._a[...] = before

        def launch(stream):
            operations["count"] += 1
            for repeat, _, _ in tape:
                repeat()

        return _types.SimpleNamespace(launch=launch)


ndarray, linalg = Array, _Linalg()
fft = _types.SimpleNamespace(rfft2=_call(_np.fft.rfft2), irfft2=_call(_np.fft.irfft2))
recordable_cublas = _types.SimpleNamespace(  # `fast.gpu.RecordableBlas`
    **dict(zip(("sgemm", "sgemmStridedBatched"), _gemm(_np.dtype("f4")))),
    **dict(zip(("dgemm", "dgemmStridedBatched"), _gemm(_np.dtype("f8")))),
)


class _Cublas:
    def __getattr__(self, name):
        _refuse_in_a_recording("CuPy does not call cuBLAS then", NotImplementedError)
        return getattr(recordable_cublas, name)


cuda = _types.SimpleNamespace(
    Stream=_Stream,
    get_current_stream=_Stream,
    MemoryPool=lambda: _types.SimpleNamespace(malloc=None),
    using_allocator=lambda malloc: _contextlib.nullcontext(),
    device=_types.SimpleNamespace(get_cublas_handle=lambda: "handle"),
    cublas=_Cublas(),
)


def __getattr__(name):
    return _lookup(_np, MISSING, name)
