# Images that the chart runs, one target each:
#
#   docker build --target cpu  -t mell-ray:0.1.0-cpu .
#   docker build --target cuda -t mell-ray:0.1.0-cuda .
#
# Every package has the version of constraints.txt. On a machine without a GPU a much smaller PyTorch
# will do: name the index that has PyTorch's CPU builds in the build argument PIP_EXTRA_INDEX_URL.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build-cpu
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/mell/bin:${PATH} \
    PIP_CONSTRAINT=/src/constraints.txt \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# For the kernels of CPUs, kernels/native; what runs needs no compiler for them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/mell
COPY constraints.txt pyproject.toml ./
# Dependencies first: a change of the code leaves this layer alone.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install -r requirements.txt
COPY README.md LICENSE ./
COPY mell_ray ./mell_ray
COPY kernels/mell_kernels ./kernels/mell_kernels
COPY kernels/native ./kernels/native
RUN pip install --no-deps .

FROM build-cpu AS build-cuda
# PIP_CONSTRAINT pins it.
# hadolint ignore=DL3013
RUN pip install ".[gpu-cuda13]"

# What runs: no compiler, no pip cache, no source. KubeRay's probes want bash and wget.
FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="mell-ray" \
      org.opencontainers.image.description="Serve large language models on as few GPUs as possible" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# Debian drops a version when it has a newer one, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 mell \
    && useradd --uid 1000 --gid 1000 --create-home mell \
    && install -d -o mell -g mell /models
ENV PATH=/opt/mell/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/mell
CMD ["mell-ray", "serve"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/mell /opt/mell
USER 1000:1000

FROM runtime AS cuda
# Triton compiles a launcher for each kernel with a C compiler. CUDA itself is in PyTorch's packages,
# the driver comes from the node.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/mell /opt/mell
USER 1000:1000
