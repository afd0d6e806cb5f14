"""Measurements that users run: `fastcifar bench`. Those of the operators are in `fastcifar_kernels.bench`."""
