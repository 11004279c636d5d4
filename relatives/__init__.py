"""What Orthogonal Self-Attention is compared with, one file each, in the same network."""

import fast
from relatives.fixed import FixedOrthogonal, Identity
from relatives.layers import LAYERS
from relatives.softmax import Softmax
from relatives.transformer import SKIPS, Transformer
from relatives.xsa import XSA

ATTENTION = {
    "osa": fast.MultiHeadOSA,
    "softmax": Softmax,
    "xsa": XSA,
    "identity": Identity,
    "fixed-orthogonal": FixedOrthogonal,
}

__all__ = ["ATTENTION", "LAYERS", "SKIPS", "Transformer"]
