"""The command line of train.py, made of the fields of its Config, and how it tells errors."""

import argparse
import dataclasses
import difflib
import os
import signal
import sys
from importlib.util import find_spec

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

REQUIRED = ("numpy", "safetensors", "tqdm")


class UserError(ValueError):
    """A mistake of the user's, or a bad file or disk: one line and exit status 2, no traceback."""


def option(default, help, alone=None, **may):
    """A field of Config: its default, what it is, what it is if given without a value, and what it
    may be (`converter`)."""
    about = {"help": help, "convert": converter(type(default), **may), "alone": alone}
    return dataclasses.field(default=default, metadata=about)


def converter(kind, least=0, most=1e12, choices=None):
    """What makes a `kind` of an option's text: of `choices`, from `least` to `most`, or a path."""

    def convert(text):
        value = kind(text)  # argparse tells of a ValueError
        if choices and text not in choices:
            close = difflib.get_close_matches(text, choices, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{hint}")
        if text == "":
            raise argparse.ArgumentTypeError("needs a path, got an empty one")
        if kind is not str and not least <= value <= most:  # nor NaN
            raise argparse.ArgumentTypeError(f"{text[:20]} is not from {least:,} to {most:,.0f}")
        return os.path.expanduser(value) if kind is str else value  # ~ after = is left by shells

    convert.__name__ = kind.__name__
    return convert


class Parser(argparse.ArgumentParser):
    def error(self, message):
        name = message.removeprefix("unrecognized arguments: ").split()[0]
        close = difflib.get_close_matches(name, self._option_string_actions, 1)
        hint = f"; did you mean {close[0]}?" if close and name.startswith("--") else ""
        raise UserError(message + hint)


def parse(Config, presets, arguments, description=None):
    """(Config, other arguments, {field of Config: value} of those that were given)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=form, allow_abbrev=False)
    add, fields = parser.add_argument, dataclasses.fields(Config)
    for field in fields:
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.type is bool:
            add(name, action="store_true", default=None, help=text)
        else:
            about, alone = field.metadata, field.metadata["alone"]
            help = f"{text}; default {field.default}"
            add(name, type=about["convert"], help=help, const=alone, nargs=alone and "?")
    count, path, device = converter(int, 1), converter(str), ("auto", "cpu", "cuda")
    add("--device", type=converter(str, choices=device), default="auto", help="auto, cpu or cuda")
    add("--threads", type=count, help="CPU threads; default all cores, 8 at most")
    add("--data", type=path, help="an .npz file, a folder of IDX or CIFAR-10 files; default MNIST")
    add("--max-steps", type=count, help="stop early; the schedule stays that of the full run")
    add("--log-every", type=count, help="steps from row to row of metrics.csv, default 50")
    add("--export", type=path, help="write the weights to this .safetensors file as well")
    add("--graph", action="store_true", help="on a GPU: record a step as a CUDA graph, replay it")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--out", type=path, help="the folder to write, default runs/PRESET-TIME")
    add("--resume", type=path, help="the folder of a stopped run")
    add("--eval", type=path, help="a checkpoint, or the folder of a run: test accuracy alone")
    args = parser.parse_args(arguments)
    given = {f.name: getattr(args, f.name) for f in fields if getattr(args, f.name) is not None}
    return Config(**presets[given.get("preset", "mnist")] | given), args, given


def before_numpy():
    """One BLAS thread for each of ours, which NumPy reads once; Ctrl-C without a traceback until
    everything is imported; one line for what is not installed."""
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"train.py: error: not installed: {', '.join(missing)}; "
                         "make setup, then .venv/bin/python train.py\n")  # fmt: skip
        sys.exit(2)
    for name in (name for name in [*os.environ] if name.startswith("TQDM_")):
        del os.environ[name]  # a bad one would end the import of tqdm
    os.environ.update(dict.fromkeys((*THREADS, "OSA_THREADS"), "1"))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_command(main):
    """Exits with what `main` returns, or with one line and a status for what it raises: 2 for the
    user's mistakes, 1 where training diverged."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by `>&-`
    sys.stdout.reconfigure(errors="replace")  # ‖S‖₂, on a terminal that has no such letters
    try:
        status = main()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python ends
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `train.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")
    except (UserError, NotImplementedError, OSError, MemoryError) as error:
        print("train.py: error:", *(str(error).splitlines() or ["no memory"]), file=sys.stderr)
        sys.exit(2)
