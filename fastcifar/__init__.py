"""fastcifar: from "I have this machine and this much time" to a trained CIFAR model."""

__version__ = "0.1.0"
