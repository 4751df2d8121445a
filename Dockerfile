# An image with the locked packages: docker build -t largebatch . && docker run --gpus all largebatch train
# PyTorch's wheels bring their own CUDA libraries; the base must fit the host's driver. Without a GPU: BASE=ubuntu:24.04
ARG BASE=nvidia/cuda:13.2.0-runtime-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# A C compiler and Python's headers: for Triton's kernels and for the decoder of JPEGs.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The image's user must be able to write the mounted directory of runs: --build-arg UID=$(id -u)
ARG UID=1000
RUN useradd --create-home --non-unique --uid "${UID}" largebatch \
    && install -d -o largebatch /opt/largebatch /work /work/runs
USER ${UID}
WORKDIR /opt/largebatch

ENV HOME=/home/largebatch \
    UV_PROJECT_ENVIRONMENT=/opt/largebatch/.venv \
    UV_COMPILE_BYTECODE=1
# hadolint ignore=DL3013
RUN python3 -m venv /home/largebatch/uv && /home/largebatch/uv/bin/pip install --no-cache-dir uv
# The packages are a layer of their own: a change of the code does not install them again.
COPY --chown=largebatch pyproject.toml uv.lock README.md LICENSE ./
RUN /home/largebatch/uv/bin/uv sync --frozen --no-dev --no-install-project --no-cache
COPY --chown=largebatch conf conf
COPY --chown=largebatch hydra_plugins hydra_plugins
COPY --chown=largebatch largebatch largebatch
RUN /home/largebatch/uv/bin/uv sync --frozen --no-dev --no-editable --no-cache

ENV PATH=/opt/largebatch/.venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["largebatch"]
CMD ["--help"]
