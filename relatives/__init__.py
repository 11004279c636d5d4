"""What Orthogonal Self-Attention is compared with: one mechanism a file, see README.md."""
