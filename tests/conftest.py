"""What the same test bodies run on, above all `xp`: NumPy, a refusing stand-in, and CuPy."""

import os
from collections import Counter

# Threads of OpenBLAS get in each other's way on matrices as small as these, on a busy machine
# by a factor of a hundred.  Read when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import warnings  # noqa: E402

import cases  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import refusing  # noqa: E402

from fast.gpu import find_device  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # CuPy's remark on an unset CUDA_PATH is no reason to skip it
    GPU, WHY = find_device("auto")


@pytest.fixture(params=["numpy", "refusing", "cupy"])
def xp(request):
    """An array module.  `xp.asarray` moves a NumPy array there, `ag.to_cpu` moves it back."""
    if request.param == "cupy" and GPU is np:
        pytest.skip(WHY)
    return {"numpy": np, "refusing": refusing, "cupy": GPU}[request.param]


def each(values):
    """A fixture of all values of a dict, or of a list; a test may name other values itself."""
    named = values if isinstance(values, dict) else {v: v for v in values}
    return pytest.fixture(params=named)(lambda request: named[request.param])


operator, dtype, case = each(cases.OPERATORS), each(cases.DTYPES), each(cases.CASES)
route, method, spectrum = each(cases.ROUTES), each(cases.METHODS), each(cases.SPECTRA)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pytest_terminal_summary(terminalreporter):
    """One line for each reason to skip, with the number of tests."""
    reasons = Counter(str(r.longrepr[2]) for r in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} tests: {reason}")
