"""What is publicly known of the official data sets (https://www.cs.toronto.edu/~kriz/cifar.html)."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Official:
    """One official data set: its names, its files, and what its content must hash to."""

    name: str
    title: str
    class_names: tuple[str, ...]
    archive: str
    archive_md5: str
    folder: str
    batches: dict[str, tuple[str, ...]]  # split -> files
    meta: str
    labels_key: str
    class_names_key: str
    digests: dict[str, str]  # split -> digest.content_digest
    counts: dict[str, int]
    table: Path  # first bytes of the digest of each image, see digest.py

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.batches["train"], *self.batches["test"], self.meta)


CIFAR10 = Official(
    name="cifar10",
    title="CIFAR-10",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    archive="cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    batches={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    meta="batches.meta",
    labels_key="labels",
    class_names_key="label_names",
    digests={
        "train": "d59acf989e068e709ce686cda292672c7b212c08d29d3d3e6d8c3aa99eba6a85",
        "test": "899683d46c3a8c66fd56e1af12202e69fe5a4517be10b0f68e04c78fe585c57c",
    },
    counts={"train": 50_000, "test": 10_000},
    table=Path(__file__).parent / "known_cifar10.bin",
)

CIFAR100 = Official(
    name="cifar100",
    title="CIFAR-100",
    class_names=tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
        lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
        pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
        shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
        television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """.split()  # noqa: SIM905 (a hundred quoted names are harder to read)
    ),
    archive="cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    batches={"train": ("train",), "test": ("test",)},
    meta="meta",
    labels_key="fine_labels",
    class_names_key="fine_label_names",
    digests={
        "train": "36ce7a701fbea47796e570c34382aad50f2539687cfcbc6ae96e2f56530d29b6",
        "test": "d3cd5d87a1b9317a0982c8ef5535fe3b86da8da90b13ce5e9b23ea06400dd5eb",
    },
    counts={"train": 50_000, "test": 10_000},
    table=Path(__file__).parent / "known_cifar100.bin",
)

OFFICIAL = {official.name: official for official in (CIFAR10, CIFAR100)}
