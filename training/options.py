"""The command line of train.py, made of the fields of its Config, and how it tells errors."""

import argparse
import dataclasses
import difflib
import math
import os
import signal
import sys

THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
PATHS = ("data", "out", "resume", "eval", "export")


class UserError(Exception):
    """A mistake of the user's: one line and exit status 2, no traceback."""


def option(default, help, *, above=None, least=0, most=1e12, choices=None):
    """A field of Config: its default, what it is, and what it may be."""
    about = {"help": help, "above": above, "least": least, "most": most, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


def check_values(config):
    """Raises UserError for the first field of a Config that is not what it may be."""
    for field in dataclasses.fields(config):
        value, may, name = getattr(config, field.name), field.metadata, option_name(field)
        if may["choices"]:
            if value not in may["choices"]:
                raise UserError(f"{name}: {not_one_of(value, may['choices'])}")
        elif type(value) is bool:
            pass
        elif may["above"] is not None and not value > may["above"]:
            raise UserError(f"{name} must be above {may['above']}, got {value}")
        elif not may["least"] <= value < math.inf:
            raise UserError(f"{name} must be {may['least']} or more, and finite, got {value}")
        elif value > may["most"]:
            raise UserError(f"{name} must be at most {may['most']:,.0f}, got {value}")


def option_name(field):
    return "--" + field.name.replace("_", "-")


def not_one_of(value, choices):
    close = difflib.get_close_matches(value, choices, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{value!r} is not one of {', '.join(choices)}{hint}"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def one_of(choices):
    def convert(value):
        if value in choices:
            return value
        raise argparse.ArgumentTypeError(not_one_of(value, choices))

    return convert


def positive_int(value):
    if not value.isdecimal() or len(value) > 12 or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value[:20]!r} is not a positive whole number")
    return int(value)


def whole(value):
    try:
        return int(value) if len(value) < 20 else 10**20  # too large, as `check_values` will say
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value[:20]!r} is not a whole number") from None


def parse(Config, presets, arguments, description=None):
    """(Config, other arguments, {field of Config: value} of those that were given)."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fields = dataclasses.fields(Config)
    for field in fields:
        name, may = option_name(field), field.metadata
        if field.type is bool:
            parser.add_argument(name, action="store_true", default=None, help=may["help"])
        else:
            convert = one_of(may["choices"]) if may["choices"] else field.type
            text = f"{may['help']}; default {field.default}"
            parser.add_argument(name, type=whole if convert is int else convert, help=text,
                                metavar=field.type.__name__.upper())  # fmt: skip
    devices = ("auto", "cpu", "cuda")
    for name, kind, text in (
        ("--device", one_of(devices), "auto, cpu or cuda; default auto"),
        ("--threads", positive_int, "CPU threads; default all cores, 8 at most"),
        ("--data", str, "an .npz file or a folder of IDX files; default the bundled MNIST"),
        ("--max-steps", positive_int, "stop early; the schedule stays that of the full run"),
        ("--log-every", positive_int, "steps from row to row of metrics.csv, default 50"),
        ("--out", str, "the folder to write, default runs/PRESET-TIME"),
        ("--resume", str, "the folder of a stopped run"),
        ("--eval", str, "a checkpoint, or the folder of a run: test accuracy alone"),
        ("--export", str, "write the weights to this .safetensors file as well"),
    ):
        parser.add_argument(name, type=kind, help=text, metavar="X")
    parser.add_argument("--graph", action="store_true",
                        help="on a GPU: record a step as a CUDA graph and replay it")  # fmt: skip
    args = parser.parse_args(arguments)
    args.device = args.device or "auto"

    given = {f.name: getattr(args, f.name) for f in fields if getattr(args, f.name) is not None}
    config = Config(**{**presets[given.get("preset", "mnist")], **given})
    check_values(config)
    for name in PATHS:
        if getattr(args, name) == "":
            raise UserError(f"--{name} needs a path, got an empty one")
    if sum(bool(x) for x in (args.resume, args.eval, args.out)) > 1:
        raise UserError("--resume, --eval and --out exclude one another")
    return config, args, given


def before_numpy():
    """One BLAS thread for each of ours, which NumPy reads once; Ctrl-C without a traceback until
    everything is imported."""
    os.environ.update(dict.fromkeys((*THREADS, "OSA_THREADS"), "1"))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_command(main, errors):
    """Exits with what `main` returns, or with one line and a status for what it raises: 2 for the
    user's mistakes and for `errors`, 1 where training diverged."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by `>&-`
    sys.stdout.reconfigure(errors="replace")  # ‖S‖₂, on a terminal that has no such letters
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, *errors) as error:
        message, status = f"error: {' '.join(str(error).splitlines())}", 2
    except BrokenPipeError:  # `train.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"error: {where}{error.strerror or error}", 2
    except MemoryError as error:
        message, status = f"error: not enough memory: {error}", 2
    except FloatingPointError as error:
        message, status = str(error), 1
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(status)
