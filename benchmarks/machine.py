"""What a committed result says of the machine that made it."""

import os
import platform
import sys
import time

import numpy as np

from report import cpu_model


def about():
    """Command, date, processor, versions."""
    torch = sys.modules.get("torch")
    return {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{cpu_model()}, {os.cpu_count()} cores",
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__ if torch else None,
    }
