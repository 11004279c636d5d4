"""examples/torch_model.py: the exported model is the same function in PyTorch, with gradients."""

import sys
from pathlib import Path

import numpy as np
import pytest

import autograd as ag
import osa_minimal
import train
from training import checkpoint, data, resume

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(train.__file__).parent / "examples"))
from torch_model import SkiplessTransformer  # noqa: E402

SIZES = {
    "16 tokens": dict(d=24, heads=2, depth=3, patch=3, image=(12, 12), classes=5, mlp_ratio=2),
    "colour": dict(d=8, heads=2, depth=2, patch=2, image=(8, 6, 3), classes=4, mlp_ratio=1),
    "one token": dict(d=8, heads=4, depth=1, patch=4, image=(4, 4), classes=3, mlp_ratio=1),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_and_gradients_are_ours_in_float64(sizes, rng, tmp_path):
    ours = osa_minimal.SkiplessTransformer(**sizes, eta=0.3, rng=rng, dtype=np.float64)
    for p in ours.parameters.values():  # away from the start, where biases are 0 and heads alike
        p.data = p.data + 0.1 * rng.standard_normal(p.shape)
    arrays = {k: p.data for k, p in ours.parameters.items()}
    about = {**sizes, "attention": "osa", "skip": "none", "norm": False, "mean": 0.1, "std": 0.3,
             "slope": ours.slope}  # fmt: skip
    path = tmp_path / "m.safetensors"
    checkpoint.export(path, arrays, {k: str(v) for k, v in about.items()})
    theirs = SkiplessTransformer(path)
    assert (theirs.mean, theirs.std) == (0.1, 0.3)

    images = rng.standard_normal((7, *sizes["image"]))
    labels = rng.integers(0, sizes["classes"], 7)
    logits = ours(images)
    got = theirs(torch.tensor(images))
    # Some thousand operations with eps = 2e-16 each, on numbers about 1.
    np.testing.assert_allclose(got.detach().numpy(), logits.data, rtol=0, atol=1e-12)
    ag.cross_entropy(logits, labels).backward()
    torch.nn.functional.cross_entropy(got, torch.tensor(labels)).backward()
    named = {k.removeprefix("outer."): p for k, p in theirs.named_parameters()}
    assert set(named) == set(arrays)
    for k, p in ours.parameters.items():
        np.testing.assert_allclose(named[k].grad.numpy(), p.grad, rtol=0, atol=1e-12, err_msg=k)
    assert max(abs(p.grad).max() for p in ours.parameters.values()) > 0.01


def test_a_trained_and_exported_run_gives_the_same_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(train.report, "draw_curves", lambda *_: None)
    path, out = tmp_path / "m.safetensors", tmp_path / "run"
    train.main([*"--preset tiny --limit-data 200 --max-steps 3 --threads 1 --device cpu".split(),
                "--out", str(out), "--export", str(path)])  # fmt: skip
    config, _, arrays = resume.load(out, train.Config, {})
    run = train.Run(config, data.load())
    resume.restore(arrays, run.parameters)
    theirs = SkiplessTransformer(path)
    images = run.dataset.x_test[:50]
    got = theirs((torch.tensor(images).float() / 255 - theirs.mean) / theirs.std)
    wanted = run.model(run.standardise(images)).data
    assert got.dtype == torch.float32 and wanted.dtype == np.float32
    # float32, eps = 1.2e-7, through two layers and patches of 49 pixels.
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"not of images \(14, 14\)"):
        theirs(torch.zeros(1, 14, 14))


@pytest.mark.parametrize("field", ["attention", "skip", "norm"])
def test_another_network_is_refused(field, tmp_path):
    about = {"attention": "osa", "skip": "none", "norm": "False"} | {field: "True"}
    path = tmp_path / "m.safetensors"
    checkpoint.export(path, {"W_E": np.ones(2)}, about)
    with pytest.raises(ValueError, match="no skipless OSA model"):
        SkiplessTransformer(path)
