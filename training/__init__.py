"""What a run needs beside its loop; each file can be read alone, and train.py without them."""
