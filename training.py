"""A training run: the model of a configuration, its data, its optimisers and its steps."""

import dataclasses
import math
import os
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import autograd as ag
import baselines
import checkpoint
import data
import machines
import optimizers
import report
from options import UserError
from osa_minimal import attention_matrix, calibrate_alpha, rotation_angles

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
        self.pieces, self.graph = (), None  # see `lay_out`
        if args.graph:
            self.check_graph()
        self.measures = any(k.endswith(".alpha") for k in self.parameters)  # S exists
        self.step, self.seconds, self.worst_error, self.largest_s = 0, 0.0, 0.0, 0.0
        self.log_every = args.log_every or meta.get("log_every") or 50
        self.sums = meta.get("sums") or [0, 0, 0]  # of the steps since the last row; see report.Log
        if saved is None:
            calibrate(self.model, self.batch()[0], config.s_norm)
        else:
            self.restore(*saved)

    def check_graph(self):
        """Refuses --graph where a step could not be recorded."""
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
        self.graph = ag.Graph(self.xp, self.whole_step) if self.args.graph else None

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
