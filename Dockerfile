# docker build --build-arg COMMIT="$(git describe --always --dirty --abbrev=40)" -t fastcifar .
# mkdir -p runs && docker run --gpus all --ipc=host -v "$PWD/runs:/home/fastcifar/runs" \
#   -v fastcifar-cache:/home/fastcifar/.cache fastcifar train --budget 5min

# The CUDA that PyTorch's wheels on PyPI are built for; they bring its libraries, so the smallest flavour does.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# A compiler and Python's headers: FFCV is compiled here; Triton and torch.compile compile while a model trains.
# libgl1 and libglib2.0-0 are what OpenCV's wheel loads, which FFCV imports.
# No versions: Ubuntu's mirrors keep only the newest build of a package, so one that is pinned is soon gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ pkg-config python3-dev python3-venv libopencv-dev libturbojpeg0-dev libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# Root owns the packages; the user's home is all that a run writes to. Uid 1000 is what most folders mounted into a
# container belong to, but Ubuntu's image has given it to a user of its own.
RUN if id ubuntu; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid 1000 fastcifar \
    && install --directory --owner=fastcifar --group=fastcifar /home/fastcifar/.cache \
    && python3 -m venv /opt/venv
# What Triton and torch.compile compile is kept where a run's other caches are.
ENV PATH=/opt/venv/bin:$PATH \
    TRITON_CACHE_DIR=/home/fastcifar/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/home/fastcifar/.cache/torchinductor

# All that is big and slow to install, from the list alone: a change of the code leaves this layer as it is.
COPY pyproject.toml /opt/fastcifar/
RUN python -c 'import tomllib; project = tomllib.load(open("/opt/fastcifar/pyproject.toml", "rb"))["project"]; \
        extras = project["optional-dependencies"]; \
        print(*project["dependencies"], *extras["parquet"], *extras["ffcv"], *extras["dali"], sep="\n")' \
        > /opt/requirements.txt \
    && pip install --no-cache-dir --requirement /opt/requirements.txt \
    && rm /opt/requirements.txt

COPY . /opt/fastcifar/
RUN pip install --no-cache-dir '/opt/fastcifar[parquet,ffcv,dali]'

# What result.json and the benchmarks record as the commit of the code: there is no checkout in here.
ARG COMMIT
ENV FASTCIFAR_COMMIT=$COMMIT

USER 1000
WORKDIR /home/fastcifar
ENTRYPOINT ["fastcifar"]
CMD ["--help"]
