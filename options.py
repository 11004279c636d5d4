"""The options of train.py: configuration, presets, and what they may be."""

import argparse
import dataclasses
import difflib
import math

import baselines


class UserError(Exception):
    """A mistake of the user's: one line and exit status 2, no traceback."""


@dataclasses.dataclass
class Config:
    """What determines the weights, with data, threads, ranks, --graph; the defaults are "mnist"."""

    preset: str = "mnist"
    attention: str = "osa"
    skip: bool = False
    norm: bool = False
    depth: int = 4
    width: int = 64
    heads: int = 2
    patch: int = 7
    mlp_ratio: int = 4
    eta: float = 0.65  # correlation that the tailored leaky ReLUs of all layers take 0 to
    s_norm: float = 0.1  # ‖S‖₂ on the first batch, to which α is calibrated
    epochs: int = 5
    batch_size: int = 128
    optimizer: str = "muon"
    lr: float = 0.01  # of the matrices under Muon; of everything under AdamW
    adam_lr: float = 0.01  # of what is not a matrix, under Muon
    alpha_lr: float = 0.001
    weight_decay: float = 0.0  # of AdamW
    warmup: int = 100
    clip: float = 1.0
    shift: int = 1  # training images are moved by up to this many pixels, each way
    limit_data: int = 0  # 0: all
    seed: int = 0


PRESETS = {
    "mnist": {},
    "tiny": {
        "depth": 2,
        "eta": 0.45,
        "epochs": 10,
        "limit_data": 1000,
        "batch_size": 50,
        "warmup": 20,
    },
    "pixels": {"depth": 2, "eta": 0.45, "width": 32, "patch": 1, "epochs": 1, "batch_size": 32},
}
CHOICES = {
    "preset": tuple(PRESETS),
    "attention": tuple(baselines.ATTENTION),
    "optimizer": ("muon", "adamw"),
    "device": ("auto", "cpu", "cuda"),
}
POSITIVE = ("depth", "width", "heads", "patch", "mlp_ratio", "epochs", "batch_size", "eta", "clip")
NOT_NEGATIVE = ("s_norm", "lr", "adam_lr", "alpha_lr", "weight_decay", "warmup", "shift",
                "limit_data", "seed")  # fmt: skip
LARGEST = {"depth": 1000, "width": 16384, "mlp_ratio": 1024, "s_norm": 1e6}  # mistyped beyond
FILES = ("config.json", "metrics.csv", "summary.json", "checkpoint.npz", "curves.png")
PATHS = ("data", "out", "resume", "eval", "export")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def one_of(name):
    def convert(value):
        if value in CHOICES[name]:
            return value
        close = difflib.get_close_matches(value, CHOICES[name], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise argparse.ArgumentTypeError(
            f"{value!r} is not one of {', '.join(CHOICES[name])}{hint}"
        )

    return convert


def positive_int(value):
    if not value.isdecimal() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def parse(arguments, description=None):
    """(Config, other arguments, names of the configuration's fields that were given)."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Config):
        option = "--" + field.name.replace("_", "-")
        if field.type is bool:
            what = {"skip": "skip connections", "norm": "layer normalisation"}[field.name]
            parser.add_argument(option, action="store_true", default=None, help=what)
        else:
            convert = one_of(field.name) if field.name in CHOICES else field.type
            parser.add_argument(option, type=convert, metavar=field.type.__name__.upper(),
                                help=f"default {field.default}")  # fmt: skip
    parser.add_argument("--device", type=one_of("device"), default="auto", metavar="NAME")
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads, default all cores"
    )
    parser.add_argument("--data", metavar="PATH", help="an .npz file or a folder of IDX files")
    parser.add_argument("--max-steps", type=positive_int, metavar="N",
                        help="stop early; the schedule stays that of the full run")  # fmt: skip
    parser.add_argument("--graph", action="store_true",
                        help="on a GPU: record a step as a CUDA graph and replay it")  # fmt: skip
    parser.add_argument("--log-every", type=positive_int, metavar="N", help="default 50")
    parser.add_argument("--out", metavar="DIR", help="default runs/PRESET-TIME")
    parser.add_argument("--resume", metavar="DIR", help="the folder of a stopped run")
    parser.add_argument("--eval", metavar="CHECKPOINT")
    parser.add_argument("--export", metavar="FILE.safetensors")
    args = parser.parse_args(arguments)

    names = [f.name for f in dataclasses.fields(Config)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = Config(**{**PRESETS[given.get("preset", "mnist")], **given})
    check_values(config)
    for name in PATHS:
        if getattr(args, name) == "":
            raise UserError(f"--{name} needs a path, got an empty one")
    if sum(bool(x) for x in (args.resume, args.eval, args.out)) > 1:
        raise UserError("--resume, --eval and --out exclude one another")
    return config, args, given


def check_values(config):
    """Raises UserError for the first field of a Config out of its range."""
    for name in POSITIVE + NOT_NEGATIVE:
        value, option = getattr(config, name), "--" + name.replace("_", "-")
        if name in POSITIVE and not value > 0:
            raise UserError(f"{option} must be positive, got {value}")
        if name in NOT_NEGATIVE and not 0 <= value < math.inf:
            raise UserError(f"{option} must be 0 or more, and finite, got {value}")
        if value > LARGEST.get(name, math.inf):
            raise UserError(f"{option} must be at most {LARGEST[name]:,.0f}, got {value}")
    for name in ("preset", "attention", "optimizer"):
        if getattr(config, name) not in CHOICES[name]:
            raise UserError(f"--{name} must be one of {', '.join(CHOICES[name])}")
