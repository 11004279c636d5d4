"""The way out: the trained network as a PyTorch module; osa_torch.py lies beside this file.
train.py --eval runs/NAME --export model.safetensors       writes the file;
model = SkiplessTransformer("model.safetensors")           reads it;
logits = model((images / 255 - model.mean) / model.std)    images (B, H, W[, C]), 0 … 255
"""

import math

from osa_torch import osa
from safetensors import safe_open
from torch import nn
from torch.nn.functional import leaky_relu


class Weights(nn.Module):
    """A module whose parameters are the tensors of a dict."""

    def __init__(self, weights):
        super().__init__()
        for name, w in weights.items():
            self.register_parameter(name, nn.Parameter(w))


class Layer(Weights):
    """X ← MLP(M-OSA(X)), X (B, N, d): no skip connection, no normalisation."""

    def forward(self, X, slope):
        h, d, _ = self.W_QK.shape
        Q, K = (X[:, None] @ self.W_QK).chunk(2, dim=-1)  # (B, h, N, d_v) each
        V = (X @ self.W_V).unflatten(-1, (h, d // h)).transpose(1, 2)
        X = osa(Q, K, V, self.alpha).transpose(1, 2).flatten(2) @ self.W_O
        gain = math.sqrt(2 * self.W_1.shape[1] / d / (1 + slope**2))
        return gain * leaky_relu(X @ self.W_1 + self.b_1, slope) @ self.W_2 + self.b_2


class SkiplessTransformer(nn.Module):
    """Images (B, H, W[, C]) -> logits (B, classes), with the weights of an exported file."""

    def __init__(self, path):
        super().__init__()
        with safe_open(path, "pt") as file:
            about, weights = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        if [about.get(k) for k in ("attention", "skip", "norm")] != ["osa", "none", "False"]:
            raise ValueError(f"{path} is no skipless OSA model")
        self.patch = int(about["patch"])
        self.slope, self.mean, self.std = (float(about[k]) for k in ("slope", "mean", "std"))
        starts = [f"layers.{i}." for i in range(int(about["depth"]))]
        parts = [{k[len(s) :]: w for k, w in weights.items() if k.startswith(s)} for s in starts]
        self.layers = nn.ModuleList(Layer(part) for part in parts)
        self.outer = Weights({k: w for k, w in weights.items() if "." not in k})

    def forward(self, images):
        p, outer, (B, H, W) = self.patch, self.outer, images.shape[:3]
        tiles = images.reshape(B, H // p, p, W // p, p, -1).transpose(2, 3)
        patches = tiles.flatten(3).flatten(1, 2)  # (B, N, p² C)
        if patches.shape[1:] != (len(outer.b_E), len(outer.W_E)):
            raise ValueError(f"the model is not of images {tuple(images.shape[1:])}")
        X = patches @ outer.W_E + outer.b_E
        for layer in self.layers:
            X = layer(X, self.slope)
        return X.mean(dim=1) @ outer.W_C + outer.b_C
