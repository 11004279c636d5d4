"""Trains a skipless Orthogonal-Self-Attention Transformer on MNIST, on a CPU or a GPU.

    python train.py                          the main job, preset "mnist"
    python train.py --preset tiny            ten seconds, 1,000 images
    python train.py --attention softmax --skip --norm       a baseline: the usual ViT
    python train.py --resume runs/NAME       goes on with a stopped run
    python train.py --eval runs/NAME/checkpoint.npz         test accuracy of a trained model
    mpiexec -n 4 python train.py             the main job in four processes, or on four cards

Every run writes a folder with config.json, metrics.csv, summary.json, checkpoint.npz, curves.png.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"
)  # fmt: skip

if __name__ == "__main__":
    # One BLAS thread each for the threads of `Run.gradients`; read once, when NumPy is imported.
    os.environ.update(dict.fromkeys((*THREAD_VARIABLES, "OSA_THREADS"), "1"))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np  # noqa: E402

import autograd as ag  # noqa: E402
import baselines  # noqa: E402
import checkpoint  # noqa: E402
import data  # noqa: E402
import machines  # noqa: E402
import optimizers  # noqa: E402
import report  # noqa: E402
from osa_minimal import attention_matrix, calibrate_alpha, rotation_angles  # noqa: E402


class UserError(Exception):
    """A mistake of the user's: one line and exit status 2, no traceback."""


# ---------------------------------------------------------------------------------- configuration


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


def parse(arguments):
    """(Config, other arguments, names of the configuration's fields that were given)."""
    parser = Parser(
        description=__doc__,
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


# -------------------------------------------------------------------------------- model and steps


def build(config, image, classes, xp):
    """The model of a configuration; a bad combination of sizes is the user's error."""
    try:
        return baselines.Transformer(
            attention=config.attention, skip=config.skip, norm=config.norm, d=config.width,
            heads=config.heads, depth=config.depth, patch=config.patch, image=image,
            classes=classes, mlp_ratio=config.mlp_ratio, eta=config.eta,
            rng=np.random.default_rng([config.seed, 0]), xp=xp,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def attention_inputs(model, images):
    """Yields (attention, Q, K) of every layer that has Q and K, as arrays (B, h, N, d_v)."""
    with ag.no_grad():
        X = model.embed(images)
        for parts in model.layers:
            attention = parts[0]
            if "alpha" in attention.parameters:
                F = attention.project(X if len(parts) == 2 else parts[2](X)).data
                d_v = F.shape[-1] // 3
                yield attention, F[..., :d_v], F[..., d_v : 2 * d_v]
            X = model.layer(X, *parts)


def calibrate(model, images, s_norm):
    """Sets every α so that ‖S‖₂ is `s_norm` on these images, layer by layer from the first."""
    for attention, Q, K in attention_inputs(model, images):
        attention.parameters["alpha"].data = calibrate_alpha(Q, K, s_norm)


def probe(model, images):
    """max ‖S‖₂ and max |AᵀA − I| over layers, heads and images; NaN for other attentions."""
    s_norm = error = math.nan
    for attention, Q, K in attention_inputs(model, images):
        alpha = attention.parameters["alpha"].data
        xp = ag.array_module(Q)
        if not (xp.isfinite(Q).all() and xp.isfinite(K).all()):
            raise FloatingPointError("Q or K contains NaN or Inf")
        A = attention_matrix(Q, K, alpha)
        deviation = abs(A.swapaxes(-1, -2) @ A - xp.eye(A.shape[-1], dtype=A.dtype)).max()
        s_norm = np.fmax(s_norm, float(rotation_angles(Q, K, alpha).max()))
        error = np.fmax(error, float(deviation))
    return float(s_norm), float(error)


def make_optimizers(config, parameters):
    """[(optimizer, learning rate)]: Muon for the orthogonal matrices, AdamW for the rest and α."""
    alpha = {k: p for k, p in parameters.items() if k.endswith(".alpha")}
    matrices = {
        k: p for k, p in parameters.items()
        if config.optimizer == "muon" and k.startswith("layers.") and p.shape[-2:] > (1, 1)
        and p.ndim > 1 and k not in alpha
    }  # fmt: skip
    rest = {k: p for k, p in parameters.items() if k not in alpha and k not in matrices}
    adam_lr = config.adam_lr if config.optimizer == "muon" else config.lr
    decay = config.weight_decay
    groups = [(optimizers.AdamW(rest, weight_decay=decay), adam_lr)]
    if alpha:
        groups.append((optimizers.AdamW(alpha), config.alpha_lr))
    if matrices:
        groups.append((optimizers.Muon(matrices), config.lr))
    return groups


def accuracy(model, images, labels, standardise):
    """Share of `images` (uint8) classified as `labels`, and the mean cross-entropy."""
    right, loss = 0, 0.0
    tokens = images[0].size // model.patch**2
    batch = max(1, 8192 // tokens)
    with ag.no_grad():
        for i in range(0, len(labels), batch):
            y = labels[i : i + batch]
            logits = model(standardise(images[i : i + batch]))
            right += int((logits.data.argmax(axis=1) == y).sum())
            loss += float(ag.cross_entropy(logits, y).data) * len(y)
    return right / len(labels), loss / len(labels)


# ------------------------------------------------------------------------------------- a run


class Stop:
    """Notes SIGINT and SIGTERM, so that the step in progress is finished; a second one stops."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        numbers = signal.SIGINT, signal.SIGTERM
        self.before = {n: signal.signal(n, self.notice) for n in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def notice(self, number, frame):
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


# What a checkpoint's record holds besides the configuration; the first versions wrote no LATER.
LATER = {"threads": 1, "digest": 0, "log_every": 50, "statistics": [0.0, 1.0], "sums": [0.0] * 3}
PROGRESS = {"step": int, "seconds": float, "worst_error": float, "largest_s": float}


class Run:
    """One training run: model, data, optimisers, and the folder it writes to."""

    def __init__(self, config, args, xp, device, saved=None, ranks=None):
        self.config, self.args, self.xp, self.device = config, args, xp, device
        self.ranks = ranks or machines.Ranks()
        meta = saved[1] if saved else {}
        dataset = data.load(args.data)
        x, y, x_val, y_val = data.split(
            dataset, limit=config.limit_data or None, rng=np.random.default_rng([config.seed, 1])
        )
        # Of the images that the model was trained on, whatever --eval --data says.
        self.statistics = meta.get("statistics") or data.statistics(x)
        self.standardise = lambda images: data.standardise(images, *self.statistics)
        if config.shift >= x.shape[1]:
            raise UserError(
                f"--shift must be less than the image's {x.shape[1]} pixels, got {config.shift}"
            )
        self.digest = zlib.crc32(y, zlib.crc32(x))  # of the training images, for --resume
        # Everything lives on the device from here on; the test set waits for the end.
        x_padded, self.size = data.pad(x, config.shift), x.shape[1]
        self.x, self.y, self.x_val, self.y_val = map(xp.asarray, (x_padded, y, x_val, y_val))
        self.x_test, self.y_test = dataset.x_test, dataset.y_test
        self.batch_size = min(config.batch_size, len(x))
        if self.batch_size < self.ranks.size:
            raise UserError(f"{self.ranks.size} ranks need a --batch-size of at least as many")
        self.steps_per_epoch = len(x) // self.batch_size
        self.steps = config.epochs * self.steps_per_epoch

        # One replica of the model per thread; they share the arrays of the first one's parameters.
        cores = max(1, (os.cpu_count() or 1) // self.ranks.neighbours)
        self.threads = 1 if xp is not np else args.threads or cores
        self.threads = min(self.threads, self.batch_size // self.ranks.size)  # one image for each
        size, classes = dataset.x_train.shape[1], dataset.classes
        self.replicas = [build(config, size, classes, xp) for _ in range(self.threads)]
        self.model = self.replicas[0]
        self.pool = ThreadPoolExecutor(self.threads)
        self.parameters = self.model.parameters
        self.optimizers = make_optimizers(config, self.parameters)
        self.pieces = ()  # see `lay_out`
        self.graph = self.new_graph() if args.graph else None
        self.measures = any(k.endswith(".alpha") for k in self.parameters)  # S exists
        self.step, self.seconds, self.worst_error, self.largest_s = 0, 0.0, 0.0, 0.0
        self.log_every = args.log_every or meta.get("log_every") or 50
        self.sums = meta.get("sums") or [0, 0, 0]  # of the steps since the last row; see report.Log
        if saved is None:
            calibrate(self.model, self.batch()[0], config.s_norm)
        else:
            self.restore(*saved)

    def new_graph(self):
        """The whole step as a CUDA graph; refuses what could not be recorded."""
        c = self.config
        tokens, most = (self.size // c.patch) ** 2, 2 * c.width // c.heads
        if self.xp is np:
            raise UserError("--graph: CUDA graphs need a GPU; leave it out on a CPU")
        if sys.platform != "linux":
            raise UserError("--graph: CUDA graphs are recorded on Linux alone")
        if self.ranks.size > 1:
            raise UserError("--graph: the gradients of several ranks are not summed by one GPU")
        if c.attention == "osa" and tokens > most:
            raise UserError(
                f"--graph: {tokens} tokens are more than 2 d_v = {most}, and CuPy cannot record "
                "the Cholesky factors that OSA then needs; leave it out, or take a larger --patch"
            )
        return ag.Graph(self.xp, self.whole_step)

    def state(self):
        """Every array that training changes, by name, on the CPU."""
        arrays = {f"model.{k}": p.data for k, p in self.parameters.items()}
        for optimizer, _ in self.optimizers:
            arrays |= {f"optimizer.{k}": a for k, a in optimizer.state.items()}
        return {k: ag.to_cpu(a) for k, a in arrays.items()}

    def restore(self, arrays, meta):
        """Puts a checkpoint back: afterwards training goes on as if it had never stopped."""

        def form(arrays):
            return {k: (a.shape, a.dtype.kind, a.itemsize) for k, a in arrays.items()}

        if form(self.state()) != form(arrays):
            raise UserError("the checkpoint's arrays are not those of this configuration")
        for k, a in arrays.items():
            if not np.isfinite(a).all():
                raise UserError(f"the checkpoint's {k} contains NaN or Inf")
        if self.args.resume and meta.get("digest", self.digest) != self.digest:
            raise UserError(
                f"--resume {self.args.resume}: the training images are not those it began with"
            )
        for k, p in self.parameters.items():
            p.data = self.xp.asarray(arrays[f"model.{k}"])
        for optimizer, _ in self.optimizers:
            for k in optimizer.state:
                optimizer.state[k][...] = self.xp.asarray(arrays[f"optimizer.{k}"])
        progress = meta["progress"]
        for name in PROGRESS:
            setattr(self, name, progress[name])

    def save(self, folder):
        """Writes folder/checkpoint.npz, unless a number in it is NaN or Inf."""
        state = self.state()
        for name, a in state.items():
            if not np.isfinite(a).all():
                raise FloatingPointError(f"{name} contains NaN or Inf")
        progress = {k: getattr(self, k) for k in PROGRESS}
        path = self.args.data and os.path.abspath(self.args.data)
        meta = {"config": dataclasses.asdict(self.config), "progress": progress, "data": path,
                "threads": self.threads, "digest": self.digest, "statistics": self.statistics,
                "log_every": self.log_every, "sums": [float(a) for a in self.sums]}  # fmt: skip
        checkpoint.save(folder / "checkpoint.npz", state, meta)

    def choose(self, rank=0, ranks=1):
        """Which images step `self.step` takes, and their offsets, in an order drawn from the seed
        and the epoch: the whole batch, or the slice of one of several ranks."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        if i == 0 or not hasattr(self, "order"):  # drawn on the CPU, moved once per epoch
            rng, n = np.random.default_rng([self.config.seed, 2, epoch]), len(self.x)
            self.order = self.xp.asarray(rng.permutation(n))
            self.offsets = self.xp.asarray(rng.integers(0, 2 * self.config.shift + 1, (n, 2)))
            first = self.step - i
            rates = [self.rate(k) for k in range(first, first + self.steps_per_epoch)]
            self.rates = self.xp.asarray(np.array(rates))
        start, size = i * self.batch_size, self.batch_size
        part = slice(start + size * rank // ranks, start + size * (rank + 1) // ranks)
        return self.order[part], self.offsets[part]

    def images(self, chosen, offsets):
        """The chosen images, moved by their offsets and standardised, and their labels."""
        images = data.crops(self.x, chosen, offsets, self.size)
        return self.standardise(images), self.y[chosen]

    def batch(self, rank=0, ranks=1):
        """Images and labels of step `self.step`, for one of several ranks."""
        return self.images(*self.choose(rank, ranks))

    def lay_out(self):
        """All weights in one array and all gradients in another, optimiser by optimiser, so that
        what is done to all of them is one operation; again, if weights were replaced since."""
        if [id(p.data) for p in self.parameters.values()] == [id(piece) for piece in self.pieces]:
            return
        names = [k for optimizer, _ in self.optimizers for k in optimizer.parameters]
        ordered = {k: self.parameters[k] for k in names}
        self.weights = optimizers.joined([p.data for p in ordered.values()])
        self.pieces = tuple(optimizers.parts(self.weights, ordered))
        for p, piece in zip(ordered.values(), self.pieces):
            p.data = piece
        self.parameters = ordered
        self.gradient = [self.xp.empty_like(self.weights) for _ in self.replicas]
        for model, numbers in zip(self.replicas, self.gradient):
            parameters = model.parameters
            for k, room in zip(names, optimizers.parts(numbers, ordered)):
                parameters[k].room = room
        self.graph = self.new_graph() if self.args.graph else None

    def gradients(self, images, labels):
        """Fills `.grad` with those of the loss; returns the loss and the number right.

        The loss is these images' share of the mean over the batch.  Each thread takes some of them
        on its own replica, as machines would: NumPy's single calls are too short here to be worth
        dividing (a step takes 2/3 of the time).
        """

        def share_of(model, part):
            x, y = images[part], labels[part]
            logits = model(x)
            loss = ag.cross_entropy(logits, y) * (len(y) / self.batch_size)
            loss.backward()
            return loss.data, (logits.data.argmax(axis=1) == y).sum()

        self.lay_out()
        replicas = self.replicas[: len(labels)]
        ends = [len(labels) * i // len(replicas) for i in range(len(replicas) + 1)]
        parts = [slice(a, b) for a, b in zip(ends, ends[1:])]
        for model in replicas:
            for k, p in model.parameters.items():
                p.data, p.grad = self.parameters[k].data, None
        if len(replicas) == 1:
            loss, right = share_of(self.model, parts[0])
        else:
            shares = list(self.pool.map(share_of, replicas, parts))
            loss, right = (sum(a) for a in zip(*shares))
            for numbers in self.gradient[1 : len(replicas)]:
                self.gradient[0] += numbers
        for k, p in self.parameters.items():
            if p.grad is not p.room:
                raise ValueError(f"the loss does not depend on {k}")
        return loss, right

    def train_step(self):
        """One update; loss, right answers, gradient norm (all on the device) and rate factor."""
        self.lay_out()
        choice, rate = self.choose(self.ranks.rank, self.ranks.size), self.rate(self.step)
        if self.graph is None:
            results = self.whole_step(*choice, rate)
        else:
            results = self.graph(*choice, self.rates[self.step % self.steps_per_epoch])
        self.step += 1
        return *results, rate[0]

    def rate(self, step):
        """The factor on the learning rates, and t = 1, 2, … of a step."""
        warmup = min(self.config.warmup, self.steps // 2)
        return optimizers.schedule(step, self.steps, warmup), step + 1

    def whole_step(self, chosen, offsets, rate):
        """What a step does on the device; `rate` are numbers, or an array (2,) of the device."""
        loss, right = self.gradients(*self.images(chosen, offsets))
        loss, right = self.ranks.sum_gradients(self.gradient[0], loss, right)
        if not isinstance(rate, tuple):
            rate = rate.astype(self.weights.dtype)
        return loss, right, self.update(*rate)

    def update(self, factor, t):
        """Clips the gradients and changes the weights; returns the norm of the gradients."""
        w, g = self.weights, self.gradient[0]
        norm = optimizers.clip(g, self.config.clip)
        for optimizer, lr in self.optimizers:
            size = sum(p.size for p in optimizer.parameters.values())
            optimizer.update(w[:size], g[:size], lr * factor, t)
            w, g = w[size:], g[size:]
        return norm

    def train(self, folder, stop):
        """Steps until the end, `--max-steps` or a signal; writes metrics.csv and checkpoints."""
        last = min(self.steps, self.args.max_steps or self.steps)
        if self.ranks.rank:  # the first rank alone looks at the results and writes them
            while self.step < last and not self.ranks.stopped(stop):
                self.train_step()
            return self.step >= last
        log, started = report.Log(folder, self), time.perf_counter() - self.seconds
        try:
            self.steps_until(last, log, started, folder, stop)
        except FloatingPointError as error:
            kept = folder / "checkpoint.npz"
            kept = f"the last good checkpoint is {kept}" if kept.exists() else "none was saved yet"
            raise FloatingPointError(f"{error}, at step {self.step}; {kept}") from None
        finally:
            log.close()
        return self.step >= last

    def steps_until(self, last, log, started, folder, stop):
        """The loop of `train`."""
        while self.step < last and not self.ranks.stopped(stop):
            loss, right, norm, factor = self.train_step()
            log.add(loss, right)
            self.seconds = time.perf_counter() - started
            if self.step % self.log_every == 0 or self.step == last:
                if not math.isfinite(float(loss)):
                    raise FloatingPointError("the loss is NaN or Inf")
                s_norm, error = probe(self.model, self.standardise(self.x_val[:16]))
                self.worst_error = float(np.fmax(self.worst_error, error))
                self.largest_s = float(np.fmax(self.largest_s, s_norm))
                val, _ = accuracy(
                    self.model, self.x_val[:1000], self.y_val[:1000], self.standardise
                )
                log.row(factor, float(norm), val, s_norm, error)
            if self.step % self.steps_per_epoch == 0:
                self.save(folder)
        self.save(folder)


def repetition(run):
    """What a repetition of the run needs to know."""
    return {
        "config": dataclasses.asdict(run.config),
        "data": run.args.data,
        "data_crc32": run.digest,
        "ranks": run.ranks.size,
        "graph": run.args.graph,
        **report.environment(run),
    }


def summarise(run, folder):
    """The one look at the test set; writes summary.json and curves.png, returns the summary."""
    x_test, y_test = run.xp.asarray(run.x_test), run.xp.asarray(run.y_test)
    test, _ = accuracy(run.model, x_test, y_test, run.standardise)
    validation, _ = accuracy(run.model, run.x_val, run.y_val, run.standardise)
    rows = report.read_metrics(folder / "metrics.csv")
    summary = {
        "test_accuracy": test,
        "validation_accuracy": validation,
        "train_loss": float(rows[-1]["train_loss"]) if rows else None,
        "steps": run.step,
        "seconds": round(run.seconds, 2),
        "orthogonality_error": run.worst_error if run.measures else None,
        "max_S_norm": run.largest_s if run.measures else None,
        "parameters": sum(p.size for p in run.parameters.values()),
        "peak_memory_mb": report.peak_memory(),
        "repeat": repetition(run),
    }
    report.write_json(folder / "summary.json", summary)
    if rows:
        report.draw_curves(rows, folder / "curves.png")
    return summary


def new_folder(args, config):
    """The folder of a new run, created; never one that holds a run already."""
    name = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.out) if args.out else Path("runs") / name
    try:
        if any((folder / name).exists() for name in FILES):
            raise UserError(
                f"{folder} holds a run already; choose another --out, or --resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    return check_folder(folder)


def check_folder(folder):
    """Refuses a folder in which a run's files could not be written later; returns it."""
    try:
        probe_file = folder / ".writable"
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    for path in (folder / name for name in FILES):
        if os.path.lexists(path) and not (path.is_file() and os.access(path, os.W_OK)):
            raise UserError(f"{path} is not a file that can be written")
    return folder


@contextlib.contextmanager
def in_use(folder):
    """Keeps a second process out of `folder`; the lock ends with this one, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another run") from None
        except OSError:
            pass  # a file system without locks
        for half in folder.glob("checkpoint.npz.*.tmp"):  # of a run killed while it saved
            half.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def kind(value):
    return [type(v) for v in value] if isinstance(value, list) else type(value)


def load_checkpoint(path, given):
    """(Config, arrays, meta) of a checkpoint; options that were given must agree with it."""
    arrays, meta = checkpoint.load(path)
    known, form = [f.name for f in dataclasses.fields(Config)], Config()
    config, progress = meta.get("config"), meta.get("progress")
    if (
        not isinstance(config, dict)
        or set(config) != set(known)
        or any(type(config[k]) is not type(getattr(form, k)) for k in known)
        or not isinstance(progress, dict)
        or {k: type(v) for k, v in progress.items()} != PROGRESS
        or not all(0 <= v < math.inf for v in progress.values())
        or type(meta.get("data")) not in (str, type(None))
        or any(kind(meta.get(k, form)) != kind(form) for k, form in LATER.items())
        or not all(0 <= v < math.inf for k in LATER for v in np.ravel(meta.get(k, 0)))
        or not meta.get("statistics", LATER["statistics"])[1] > 0
    ):
        raise UserError(f"{path} is not a checkpoint of this program")
    try:
        checkpoint.require_same(meta["config"], {**meta["config"], **given}, known)
    except checkpoint.CheckpointError as error:
        raise UserError(f"{path}: {error}") from None
    config = Config(**meta["config"])
    try:
        check_values(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, arrays, meta


def check_writable(path):
    """Refuses a file that could not be written later, so that no training is lost."""
    folder = os.path.dirname(os.path.abspath(path))
    other = os.path.lexists(path) and not path.endswith(".safetensors")
    if other or os.path.basename(path) in FILES:  # a checkpoint or data set would be lost
        raise UserError(f"--export {path}: would replace a file that is no .safetensors file")
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"--export {path}: not a file that can be written")


def export(path, run):
    """Writes the weights, and all that another program needs to use them, as safetensors."""
    arrays = {k: ag.to_cpu(p.data) for k, p in run.parameters.items()}
    mean, std = run.statistics
    about = {"slope": run.model.layers[0][1].slope, "mean": mean, "std": std}
    metadata = {k: str(v) for k, v in {**dataclasses.asdict(run.config), **about}.items()}
    checkpoint.export_safetensors(path, arrays, metadata)
    print(f"exported {path}")


def main(arguments=None):
    try:
        ranks = machines.Ranks()
    except RuntimeError as error:
        raise UserError(str(error)) from None
    with ranks.ending_together():
        return main_of(ranks, arguments)


def main_of(ranks, arguments):
    """`main` in one of several processes."""
    config, args, given = parse(arguments)
    ag.keep_freed_memory()
    saved = None
    if args.export:
        check_writable(args.export)
    if args.eval or args.resume:
        path = Path(args.eval or args.resume)
        if args.resume and path.name == "checkpoint.npz":
            args.resume = path = path.parent
        if args.resume or path.is_dir():
            path = path / "checkpoint.npz"
        config, *saved = load_checkpoint(path, given)
        # The same data and, as sums are rounded in another order by more threads, as many of them.
        args.data = args.data or saved[1].get("data")
        args.threads = args.threads or saved[1].get("threads")
    if args.eval and ranks.rank:
        return 0
    if args.device != "cpu":
        ranks.take_card()
    try:
        xp, device = ag.find_device(args.device)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    run = Run(config, args, xp, device, saved, ranks)
    each = f" in each of {ranks.size} ranks" if ranks.size > 1 else ""
    print(f"device {device}; {run.threads} threads{each}")

    if args.eval:
        x, y = xp.asarray(run.x_test), xp.asarray(run.y_test)
        print(f"test accuracy {accuracy(run.model, x, y, run.standardise)[0]:.2%}")
        if args.export:
            export(args.export, run)
        return 0

    if ranks.size > 1:
        start = zlib.crc32(b"".join(a.tobytes() for a in run.state().values()), run.digest)
        if not ranks.agree(start):
            raise UserError("the ranks do not begin with the same images and weights")
    if ranks.rank:
        with Stop() as stop:
            run.train(None, stop)
        return 0
    folder = check_folder(Path(args.resume)) if args.resume else new_folder(args, config)
    with in_use(folder):
        return work(run, folder)


def work(run, folder):
    """The run in its folder; returns the exit status."""
    config, args = run.config, run.args
    count = sum(p.size for p in run.parameters.values())
    print(f"{config.attention}, {config.depth} layers, {count:,} parameters, {run.steps:,} steps")
    print(f"writing {folder}")
    if args.resume:
        if (folder / "metrics.csv").exists():
            report.read_metrics(folder / "metrics.csv")
    else:
        report.write_json(folder / "config.json", repetition(run))
    with Stop() as stop:
        finished = run.train(folder, stop)
    if not finished:
        name = signal.Signals(stop.signal).name
        print(
            f"{name}: stopped after step {run.step}; go on with --resume {folder}", file=sys.stderr
        )
        return 128 + stop.signal
    print(f"trained for {run.seconds:.0f} s; testing on {len(run.y_test):,} images")
    summary = summarise(run, folder)
    if args.export:
        export(args.export, run)
    print(f"test accuracy {summary['test_accuracy']:.2%}")
    print(f"files in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by `>&-`
    sys.stdout.reconfigure(errors="replace")  # ‖S‖₂, on a terminal that has no such letters
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"train.py: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `train.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"train.py: error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"train.py: error: not enough memory: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
