"""The example of data in shards: in one process, what a list of its minibatches gives."""

import torch

import laplace_kf as lk
from examples import distributed


def test_shards_are_read_once_and_by_one_process_each(tmp_path):
    files = distributed.write_shards(tmp_path)
    whole = [row for part in distributed.Shards(files, 0, 1) for row in part[0].tolist()]
    parts = [[row for x, _ in distributed.Shards(files, rank, 3) for row in x.tolist()] for rank in range(3)]
    assert sorted(whole) == sorted(row for part in parts for row in part)
    assert len({len(part) for part in parts}) > 1


def test_the_example_fits_all_shards(tmp_path, capsys):
    files = distributed.write_shards(tmp_path)
    assert distributed.main(["--shards", str(tmp_path), "--out", str(tmp_path / "posterior.safetensors")]) == 0
    assert "one process: N = 106" in capsys.readouterr().out
    kept = lk.LaplacePosterior.load(tmp_path / "posterior.safetensors", distributed.network())
    x, y = (torch.cat(each) for each in zip(*(torch.load(f, weights_only=True) for f in files), strict=True))
    one = lk.LaplacePosterior(distributed.network(), "categorical").fit(x, y)
    torch.testing.assert_close(kept.log_evidence(), one.log_evidence(), rtol=1e-4, atol=1e-4)
