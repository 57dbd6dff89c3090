"""Data look-up, readers and the messages of what is missing."""

import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
import torch
from scipy.io import savemat

from experiments.common import data, files
from laplace_kf.errors import CorruptFile, LaplaceKFError, UnknownName


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data folder, and an empty user cache."""
    monkeypatch.setenv("LAPLACE_KF_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(files, "_cache", lambda: tmp_path / "cache")
    return tmp_path / "data"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def idx(array):
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_a_missing_set_says_where_it_was_looked_for_and_how_to_get_it(root):
    with pytest.raises(data.MissingData, match=r"python -m experiments data fetch mnist") as caught:
        data.images("mnist", "train")
    assert str(root) in str(caught.value)
    assert "mnist/train-images-idx3-ubyte.gz" in str(caught.value)
    assert isinstance(caught.value, LaplaceKFError)


def test_a_set_without_a_public_address_says_which_file_to_place(root):
    with pytest.raises(data.MissingData, match=r"place the file uci-regression/yacht.npz"):
        data.regression("yacht")
    with pytest.raises(data.MissingData, match=r"place the file uci-regression/bostonHousing.npz"):
        data.fetch("uci-regression")


def test_the_variable_is_mentioned_when_it_is_not_set(root, monkeypatch):
    monkeypatch.delenv("LAPLACE_KF_DATA")
    with pytest.raises(data.MissingData, match=r"\$LAPLACE_KF_DATA"):
        data.text()


@pytest.mark.parametrize("call", [lambda: data.fetch("mnits"), lambda: data.images("mnits", "train")])
def test_an_unknown_set_lists_the_known_ones(call):
    with pytest.raises(UnknownName, match=r"'mnist'.*Did you mean 'mnist'"):
        call()


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(UnknownName, match="'test'"):
        data.images("notmnist", "train")
    with pytest.raises(UnknownName, match="'yacht'"):
        data.regression("yatch")


def test_a_failed_download_says_which_file_to_place_where(root, monkeypatch):
    import pooch

    def refuse(url, **_):
        raise OSError("no route to host\nmore lines")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    with pytest.raises(data.MissingData, match="no route to host") as caught:
        data.fetch("fashion-mnist")
    assert "fashion-mnist/train-images-idx3-ubyte.gz" in str(caught.value)
    assert str(root) in str(caught.value)
    assert "more lines" not in str(caught.value)


def test_fetch_asks_for_what_is_missing_only(root, monkeypatch):
    import pooch

    asked = []
    monkeypatch.setattr(pooch, "retrieve", lambda url, known_hash, **_: asked.append((url, known_hash)))
    write(root / "notmnist/t10k-images-idx3-ubyte.gz", b"")
    data.fetch("notmnist")
    (url, known_hash), *others = asked
    assert not others
    assert url.endswith("/t10k-labels-idx1-ubyte.gz")
    assert known_hash == "sha256:" + data.DATA_SETS["notmnist"].files[1].sha256


def test_every_file_has_a_hash():
    listed = [file for entry in data.DATA_SETS.values() for file in entry.files]
    assert len(listed) > 20
    assert all(len(file.sha256) == 64 and int(file.sha256, 16) for file in listed)
    assert all(file.url.startswith("https://") for file in listed if file.url)


def test_idx_images_are_scaled_and_shaped(root):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    write(root / "notmnist/t10k-images-idx3-ubyte.gz", idx(pixels))
    write(root / "notmnist/t10k-labels-idx1-ubyte.gz", idx(np.array([3, 9], np.uint8)))
    images, labels = data.images("notmnist", "test")
    assert images.shape == (2, 1, 28, 28)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0] * 255, torch.from_numpy(pixels).float())
    assert labels.tolist() == [3, 9]


def test_an_idx_file_is_unpacked_once_until_it_changes(root, monkeypatch):
    unpacked, original = [], gzip.decompress
    monkeypatch.setattr(gzip, "decompress", lambda raw: unpacked.append(1) or original(raw))
    place = root / "notmnist/t10k-images-idx3-ubyte.gz"
    write(place, idx(np.zeros((2, 28, 28), np.uint8)))
    write(root / "notmnist/t10k-labels-idx1-ubyte.gz", idx(np.array([3, 9], np.uint8)))
    images, labels = data.images("notmnist", "test")
    images += 1.0  # everybody gets images of their own
    labels += 1
    again, same = data.images("notmnist", "test")
    assert not again.any() and same.tolist() == [3, 9] and len(unpacked) == 2
    write(place, idx(np.full((3, 28, 28), 255, np.uint8)))
    assert data.images("notmnist", "test")[0].eq(1).all() and len(unpacked) == 3


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"\0\0"), idx(np.zeros((2, 28, 28), np.uint8))[:-5],
     gzip.compress(gzip.decompress(idx(np.zeros((2, 28, 28), np.uint8)))[:-1])],
    ids=["foreign", "header", "truncated-gzip", "truncated-pixels"],
)  # fmt: skip
def test_a_broken_idx_file_is_corrupt(root, content):
    write(root / "mnist/t10k-images-idx3-ubyte.gz", content)
    with pytest.raises(CorruptFile, match="t10k-images"):
        data.images("mnist", "test")


def cifar_records(count, label_bytes=1):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)


def encode(images):
    """The inverse of the losslessly coded form, written from its description (pixel by pixel, the slow way)."""
    red, green, blue = images.transpose(1, 0, 2, 3).astype(np.int64)
    planes = np.stack([green, red - green, blue - green]) & 255
    residual = np.zeros_like(planes)
    for i in range(32):
        for j in range(32):
            left = planes[:, :, i, j - 1] if j else np.zeros_like(planes[:, :, 0, 0])
            up = planes[:, :, i - 1, j] if i else np.zeros_like(left)
            corner = planes[:, :, i - 1, j - 1] if i and j else np.zeros_like(left)
            inner = np.median(np.stack([left, up, left + up - corner]), axis=0).astype(np.int64)
            guess = inner if i and j else left + up
            residual[:, :, i, j] = planes[:, :, i, j] - guess
    return (residual & 255).astype(np.uint8)


@pytest.mark.parametrize("form", ["folder", "archive", "coded"])
def test_all_forms_of_cifar_give_the_same_images(root, form):
    rows = cifar_records(3)
    pixels = rows[:, 1:].reshape(-1, 3, 32, 32)
    if form == "folder":
        write(root / "cifar-10-batches-bin/test_batch.bin", rows.tobytes())
    elif form == "archive":
        root.mkdir(parents=True)
        with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
            member.size = rows.nbytes
            archive.addfile(member, io.BytesIO(rows.tobytes()))
    else:
        (root / "cifar10").mkdir(parents=True)
        np.savez(root / "cifar10/test_batch.npz", residual=encode(pixels), labels=rows[:, 0])
    images, labels = data.images("cifar10", "test")
    torch.testing.assert_close(images * 255, torch.from_numpy(pixels).float())
    assert labels.tolist() == rows[:, 0].tolist()


def test_cifar100_labels_are_the_fine_ones(root):
    rows = cifar_records(2, label_bytes=2)
    write(root / "cifar-100-binary/test.bin", rows.tobytes())
    assert data.images("cifar100", "test")[1].tolist() == rows[:, 1].tolist()


def test_a_truncated_cifar_file_is_corrupt(root):
    write(root / "cifar-10-batches-bin/test_batch.bin", cifar_records(2).tobytes()[:-1])
    with pytest.raises(CorruptFile, match="cut short"):
        data.images("cifar10", "test")


def test_faces_stand_upright(root):
    (root / "olivetti").mkdir(parents=True)
    upright = np.random.default_rng(0).integers(0, 256, (400, 64, 64), dtype=np.uint8)
    savemat(root / "olivetti/olivettifaces.mat", {"faces": upright.transpose(2, 1, 0).reshape(4096, 400)})
    images, people = data.images("olivetti", "train")
    torch.testing.assert_close(images[:, 0] * 255, torch.from_numpy(upright).float())
    assert people.tolist() == [k // 10 for k in range(400)]
    savemat(root / "olivetti/olivettifaces.mat", {"faces": upright[0]})
    with pytest.raises(CorruptFile, match="4096"):
        data.images("olivetti", "train")
    savemat(root / "olivetti/olivettifaces.mat", {"people": upright[0]})
    with pytest.raises(CorruptFile, match="faces"):
        data.images("olivetti", "train")


def test_the_digits_that_come_with_scikit_learn(root):
    images, labels = data.images("digits", "train")
    assert images.shape == (1797, 1, 8, 8)
    assert images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_a_regression_table(root):
    (root / "uci-regression").mkdir(parents=True)
    table = np.arange(12.0).reshape(4, 3)
    np.savez(root / "uci-regression/yacht.npz", data=table, index_features=[0, 1], index_target=[2], n_splits=[1],
             index_train_0=[0, 1, 2], index_test_0=[3])  # fmt: skip
    found = data.regression("yacht")
    assert found.features.tolist() == table[:, :2].tolist()
    assert found.target.tolist() == table[:, 2:].tolist()
    assert [part.tolist() for part in found.splits[0]] == [[0, 1, 2], [3]]
