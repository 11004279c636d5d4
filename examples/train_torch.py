"""Trains an exported network further, in PyTorch: one process, or several with equal weights.

    python examples/train_torch.py model.safetensors --out further.safetensors
    torchrun --nproc-per-node 2 examples/train_torch.py model.safetensors

The file comes from train.py --export; torch_model.py and osa_torch.py lie beside this one.  Each
process takes its slice of every batch and DistributedDataParallel (gloo on processors, nccl on
cards) the mean of their gradients, so that K processes take the steps of one, to rounding.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed
from torch.nn import functional, parallel, utils
from torch_model import SkiplessTransformer
from tqdm import tqdm


def arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    bundled = Path(__file__).resolve().parent.parent / "data" / "mnist.npz"
    parser.add_argument("model", help="a .safetensors file of train.py --export")
    parser.add_argument("--out", help="where the trained weights go, in the same form")
    parser.add_argument("--data", default=bundled, help=".npz of x_train, y_train, x_test, y_test")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-steps", type=int, help="stop early")
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    parser.add_argument("--lr", type=float, default=3e-4, help="of AdamW; falls to 0 as a cosine")
    parser.add_argument("--shift", type=int, default=1, help="pixels that images move by, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in (args.model, args.data, os.path.dirname(args.out or "") or "."):
        if not os.path.exists(path):
            parser.error(f"{path}: no such file or folder")
    return args


def crops(padded, chosen, offsets, size):
    """Windows of size (H, W) of the images padded[chosen], at offsets (B, 2) from their corners."""
    windows = (torch.arange(n, device=padded.device) for n in size)
    rows, columns = (offsets[:, i, None] + window for i, window in enumerate(windows))
    return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def standardise(images, model):
    return (images.to(model.outer.W_E.dtype) / 255 - model.mean) / model.std


@torch.no_grad()
def print_accuracy(when, model, images, labels):
    parts = zip(images.split(500), labels.split(500))
    right = sum((model(standardise(x, model)).argmax(1) == y).sum() for x, y in parts)
    print(f"test accuracy {when} {float(right) / len(labels):.2%}", flush=True)


def main():
    args = arguments()
    # What torchrun says: which process this is of how many, and which of those on this machine.
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, size, local, neighbours = (int(os.environ.get(k, v)) for k, v in names.items())
    cards = torch.cuda.device_count() >= neighbours
    device = torch.device("cuda", local) if cards else torch.device("cpu")
    if size > 1:
        distributed.init_process_group("nccl" if cards else "gloo")

    with np.load(args.data) as file:
        keys = "x_train", "y_train", "x_test", "y_test"
        arrays = (file[k] if k[0] == "x" else file[k].astype(np.int64).reshape(-1) for k in keys)
        x, y, *test = (torch.from_numpy(a).to(device) for a in arrays)
    width = [0, 0] * (x.ndim - 3) + [args.shift] * 4  # of channels, if any, columns and rows
    padded, batch_size = functional.pad(x, width), min(args.batch_size, len(x))
    per_epoch, steps = len(x) // batch_size, args.epochs * (len(x) // batch_size)

    model = SkiplessTransformer(args.model).to(device)
    if rank == 0:
        print_accuracy("before", model, *test)
    replica = parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)  # every process draws the same batches
    for t in tqdm(range(min(steps, args.max_steps or steps)), disable=rank > 0, unit="step"):
        if t % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(device)
            offsets = torch.randint(2 * args.shift + 1, (len(x), 2), generator=generator).to(device)
        start = t % per_epoch * batch_size
        mine = slice(start + batch_size * rank // size, start + batch_size * (rank + 1) // size)
        images = crops(padded, order[mine], offsets[mine], x.shape[1:3])
        logits, labels = replica(standardise(images, model)), y[order[mine]]
        # The mean over the batch is the mean over the processes of size/batch_size times their sum.
        loss = functional.cross_entropy(logits, labels, reduction="sum") * (size / batch_size)
        optimizer.zero_grad()
        loss.backward()
        utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()

    if rank == 0:
        print_accuracy("after", model, *test)
    if rank == 0 and args.out:
        weights = {k.removeprefix("outer."): p.data.cpu() for k, p in model.named_parameters()}
        save_file(weights, args.out, safe_open(args.model, "pt").metadata())
    if size > 1:
        distributed.barrier()  # the others wait for the test of the first: all end together
        distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, SafetensorError) as error:  # of the model and the images
        sys.stderr.write(f"train_torch.py: error: {error}\n")
        sys.exit(2)
