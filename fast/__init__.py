"""The operator of `osa_minimal` for any input at full speed, on a CPU or a GPU; see README.md."""

from fast.operator import ROUTES, MultiHeadOSA, attention_matrix, osa_backward, osa_forward

__all__ = ["ROUTES", "MultiHeadOSA", "attention_matrix", "osa_backward", "osa_forward"]
