"""The data sets: the facts about each, and the reader of its raw data.

To add one, write a reader (a function from the root folder to :class:`~sfw_dist.data.datasets.raw.RawData`) and an
entry in :data:`DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfw_dist.data.datasets.array_sets import Reader, cifar_reader, mnist_reader, read_digits, svhn_reader
from sfw_dist.data.datasets.cifar_python import PythonVersion
from sfw_dist.data.datasets.download import Remote
from sfw_dist.data.datasets.image_sets import image_files, read_imagefolder, tiny_imagenet_reader


@dataclass(frozen=True)
class Dataset:
    """A data set that :func:`sfw_dist.data.prepare.prepare` can make."""

    name: str
    classes: tuple[str, ...] | None
    """``None`` when the raw data names them."""
    image_shape: tuple[int, int, int] | None
    """``(channels, height, width)``; ``None``: that of the first training image."""
    source: str
    """Where it comes from, for people."""
    read: Reader
    """From the root folder to the raw arrays; raises :class:`UserError` when they cannot be read or downloaded."""
    embedded: bool = False
    """Whether a dependency contains it, so that it can be prepared without downloads."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What a complete copy holds, as far as known: samples of ``train`` and ``test``, and ``classes``."""
    list_files: Callable[[Path], Sequence[Path]] | None = None
    """Lists the images below the root folder, for a data set whose images are whatever lies there."""
    any_size: bool = False
    """Whether its images are scaled and cropped to ``image_shape``, and another size may be chosen."""
    arguments: tuple[str, ...] | None = ()
    """What the command ``prepare`` is given to make it, if that is not the name; ``None``: no command makes it."""

    @property
    def made_from(self) -> tuple[str, ...]:
        """What the command ``prepare`` is given to make it, besides the root and options; empty if none makes it."""
        return () if self.arguments is None else self.arguments or (self.name,)


MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_CHECKSUMS = {  # of the uncompressed content, as below: people have it plain or packed anew
    "train-images-idx3-ubyte": "content-md5:6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "content-md5:a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "content-md5:2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "content-md5:27ae3e4e09519cfbb04c329615203637",
}
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CHECKSUMS = {  # of the uncompressed content, which every archive of it shares
    "train-images-idx3-ubyte": "content-sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "content-sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "content-sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "content-sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR10 = Remote(f"{CIFAR_URL}cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530")
CIFAR100 = Remote(f"{CIFAR_URL}cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8")
CIFAR10_PYTHON = PythonVersion(
    Remote(f"{CIFAR_URL}cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),
    top="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels="labels",
    names="label_names",
)
CIFAR100_PYTHON = PythonVersion(
    Remote(f"{CIFAR_URL}cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"),
    top="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
)
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
SVHN_TRAIN = Remote(f"{SVHN_URL}train_32x32.mat", "md5:e26dedcc434d2e4c54c9b2d4a06d8373")
SVHN_TEST = Remote(f"{SVHN_URL}test_32x32.mat", "md5:eb5a983be6a315427106f1b164d9cef3")
TINY_IMAGENET = Remote("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "md5:90528d7ca1a48142e341f4ef8d21d0de")

DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="digits",
            classes=tuple("0123456789"),
            image_shape=(1, 8, 8),
            source="scikit-learn's load_digits: 1,797 handwritten digits (UCI Optical Recognition, test part)",
            read=read_digits,
            embedded=True,
            counts={"train": 1_346, "test": 451},
        ),
        Dataset(
            name="mnist",
            classes=tuple("0123456789"),
            image_shape=(1, 28, 28),
            source=f"MNIST (LeCun, Cortes and Burges, 1998), {MNIST_URL}",
            read=mnist_reader("mnist", MNIST_URL, MNIST_CHECKSUMS),
            counts={"train": 60_000, "test": 10_000},
        ),
        Dataset(
            name="fashion_mnist",
            classes=(
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            image_shape=(1, 28, 28),
            source="Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), https://github.com/zalandoresearch/fashion-mnist",
            read=mnist_reader(
                "fashion_mnist",
                FASHION_MNIST_URL,
                FASHION_MNIST_CHECKSUMS,
                elsewhere=FASHION_MNIST_DEBIAN,
                alternative="apt-get install dataset-fashion-mnist",
                torchvision="FashionMNIST",
            ),
            counts={"train": 60_000, "test": 10_000},
        ),
        Dataset(
            name="cifar10",
            classes=None,
            image_shape=(3, 32, 32),
            source=f"CIFAR-10 (Krizhevsky, 2009), {CIFAR10.url}",
            read=cifar_reader(
                "cifar10",
                CIFAR10,
                "cifar-10-batches-bin",
                train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
                test="test_batch.bin",
                classes_file="batches.meta.txt",
                label_bytes=1,
                python=CIFAR10_PYTHON,
            ),
            counts={"train": 50_000, "test": 10_000, "classes": 10},
        ),
        Dataset(
            name="cifar100",
            classes=None,
            image_shape=(3, 32, 32),
            source=f"CIFAR-100, fine labels (Krizhevsky, 2009), {CIFAR100.url}",
            read=cifar_reader(
                "cifar100",
                CIFAR100,
                "cifar-100-binary",
                train=("train.bin",),
                test="test.bin",
                classes_file="fine_label_names.txt",
                label_bytes=2,
                python=CIFAR100_PYTHON,
            ),
            counts={"train": 50_000, "test": 10_000, "classes": 100},
        ),
        Dataset(
            name="svhn",
            classes=tuple("0123456789"),
            image_shape=(3, 32, 32),
            source=f"Street View House Numbers, cropped digits, without 'extra' (Netzer et al., 2011), {SVHN_URL}",
            read=svhn_reader("svhn", SVHN_TRAIN, SVHN_TEST),
            counts={"train": 73_257, "test": 26_032},
        ),
        Dataset(
            name="tiny_imagenet",
            classes=None,
            image_shape=(3, 64, 64),
            source=f"Tiny-ImageNet-200 (Stanford CS231n), its validation part as test part, {TINY_IMAGENET.url}",
            read=tiny_imagenet_reader("tiny_imagenet", TINY_IMAGENET, "tiny-imagenet-200"),
            counts={"train": 100_000, "test": 10_000, "classes": 200},
        ),
        Dataset(
            name="imagefolder",
            classes=None,
            image_shape=(3, 64, 64),
            source="the user's own images; another size was scaled by the shorter side and cropped at the centre",
            read=read_imagefolder,
            list_files=lambda root: image_files(read_imagefolder(root)),
            any_size=True,
        ),
    )
}
