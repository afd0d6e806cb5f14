"""Where the images are, and whether they really are CIFAR: `fastcifar.data.source` is the way in."""
