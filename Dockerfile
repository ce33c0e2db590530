# The server's image: `docker build --tag lossgrad .`, then
#   docker run --rm --env LOSSGRAD_INSECURE=true --publish 127.0.0.1:50051:50051 lossgrad
# LOSSGRAD_INSECURE, because nothing would be encrypted: docs/security.md says how to have a certificate instead.
# It holds the client and its command line too: the health check is `lossgrad ping`.
#
# CPU or GPU is one build argument, TORCH_FLAVOR: cpu (default), or a CUDA flavour as torch names its wheels, such as
# cu130. TORCH_INDEX_URL is the address of the index that has that flavour's wheels: the one that PyTorch's installation
# page shows behind --index-url. Without it torch comes from wherever pip is configured to look, in the flavour that is
# found there; on Linux that is often a CUDA build, which works without a GPU but makes the image several GB larger.
#   docker build --build-arg TORCH_INDEX_URL=<of the CPU wheels> --tag lossgrad .
#   docker build --build-arg TORCH_FLAVOR=cu130 --build-arg TORCH_INDEX_URL=<of the cu130 wheels> --tag lossgrad:gpu .
# Both flavours stand on the same slim base: torch's CUDA wheels bring the CUDA libraries with them, so that a CUDA base
# image would store them twice. Only the driver comes from the host.
# A mirror, a proxy's certificates and credentials go into a pip.conf mounted for the build: deploy/README.md.
#
# The same inputs give the same Python packages: all but torch come from requirements/image.txt, by their hashes. Two arguments
# pin the rest: TORCH_SHA256, the hash of torch's wheel (without it: whichever file the index has for that version), and
# PYTHON_DIGEST, the base image's, as @sha256:... What went in is in /opt/lossgrad/sbom.cdx.json.

ARG PYTHON_VERSION=3.12
ARG PYTHON_DIGEST=


# What the image stands on: Python, the account that the server runs as, an init, and for GPUs a C compiler.
FROM python:${PYTHON_VERSION}-slim-bookworm${PYTHON_DIGEST} AS base
ARG TORCH_FLAVOR=cpu
# The account has a name because torch asks for the user's name, and a fixed number so that Kubernetes can check it.
RUN groupadd --gid 10001 lossgrad \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lossgrad
# tini is process 1, because the kernel drops a SIGTERM that process 1 has no handler for: without it, stopping a server
# that is still importing torch takes the whole grace period. It also reaps orphaned processes. Docker's own --init
# would do as well, but it is the operator's to give, and Kubernetes has none.
# gcc, because Triton compiles the module by which it talks to the driver when it first meets a GPU.
# Their versions are Debian's: a pinned one vanishes from the mirrors with the next point release.
# hadolint ignore=DL3008
RUN apt-get update \
    && if [ "${TORCH_FLAVOR}" = cpu ]; then set -- tini; else set -- tini gcc libc6-dev; fi \
    && apt-get install --yes --no-install-recommends "$@" \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*


# pip and what builds the wheel in an environment of their own, and an empty environment to fill.
FROM base AS build
WORKDIR /build
COPY requirements/build.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/lossgrad && python -m venv /opt/build \
    && /opt/build/bin/pip install --require-hashes --no-deps --only-binary :all: --requirement build.txt


# Everything that is not ours, from the lock: nothing else, and no file of another hash. Changes seldom, so it is built, pushed
# and pulled seldom. pip compiles to bytecode here, because the running container cannot write any and would compile torch
# at every start.
FROM build AS dependencies
COPY requirements/image.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip --python /opt/lossgrad/bin/python install --require-hashes --no-deps --only-binary :all: \
      --report locked.json --requirement image.txt
# torch, whose wheels have other hashes in every index: requirements/lock.py. With an address the flavour is part of the
# version asked for (2.13.0+cpu), so that no other index can answer in its place. The second command brings what a CUDA build
# needs besides, NVIDIA's libraries and Triton; for the CPU it finds everything there.
ARG TORCH_FLAVOR=cpu
ARG TORCH_INDEX_URL=
ARG TORCH_SHA256=
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    torch="$(grep -E '^torch==' constraints.txt)" \
    && if [ -n "${TORCH_INDEX_URL}" ]; then \
         torch="${torch}+${TORCH_FLAVOR}"; set -- --extra-index-url "${TORCH_INDEX_URL}"; \
       fi \
    && echo "${torch}${TORCH_SHA256:+ --hash=sha256:${TORCH_SHA256}}" > torch.txt \
    && /opt/build/bin/pip --python /opt/lossgrad/bin/python install --no-deps --only-binary :all: "$@" \
         --report torch.json --requirement torch.txt \
    && /opt/build/bin/pip --python /opt/lossgrad/bin/python install --only-binary :all: "$@" \
         --report libraries.json --constraint constraints.txt "${torch}"
# A GPU image that cannot use a GPU is refused; a CPU image that is larger than it need be is only pointed out.
RUN built="$(/opt/lossgrad/bin/python -W ignore -c \
      'import torch; cuda = torch.version.cuda; print("cu" + cuda.replace(".", "") if cuda else "cpu")')" \
    && echo "torch is built for ${built}, TORCH_FLAVOR is ${TORCH_FLAVOR}" \
    && if [ "${built}" != "${TORCH_FLAVOR}" ]; then \
         echo "pass --build-arg TORCH_INDEX_URL with the index that has torch's ${TORCH_FLAVOR} wheels" >&2; \
         [ "${TORCH_FLAVOR}" = cpu ]; \
       fi
# What wheels hold for those who build and test them: torch's C++ headers, test programs and protoc, 195 MB, and the packages'
# own tests, 78 MB. Nothing here loads or compiles them. torch_shm_manager stays: torch looks for it when it is imported.
RUN rm -rf /opt/lossgrad/lib/python*/site-packages/torch/include /opt/lossgrad/lib/python*/site-packages/torch/test \
    && find /opt/lossgrad/lib/python*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete \
    && find /opt/lossgrad/lib/python*/site-packages -type d -name tests -prune -exec rm -rf {} +
# Symbols that are for debuggers alone: 117 MB of the CPU's torch and of LLVM. A CUDA build is left as NVIDIA and torch made it.
# hadolint ignore=DL3008
RUN if [ "${TORCH_FLAVOR}" = cpu ]; then \
      apt-get update && apt-get install --yes --no-install-recommends binutils \
      && rm -rf /var/lib/apt/lists/* \
      && strip --strip-unneeded /opt/lossgrad/lib/python*/site-packages/torch/lib/*.so \
           /opt/lossgrad/lib/python*/site-packages/llvmlite/binding/*.so \
      && apt-get purge --yes --auto-remove binutils; \
    fi


# lossgrad itself, as a small layer that lands on top of the dependencies.
FROM build AS package
COPY LICENSE README.md pyproject.toml ./
COPY proto proto
COPY server server
COPY client client
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && /opt/build/bin/pip --python /opt/lossgrad/bin/python install --no-deps --no-index --root /package wheels/*.whl


# The CPU kernels, compiled for the levels of processors that the server knows: a container cannot keep what it compiles,
# and would spend half a minute of CPU time on it at every start. On other processors it does.
FROM dependencies AS kernels
COPY --from=package /package /
RUN NUMBA_CACHE_DIR=/opt/lossgrad/kernels /opt/lossgrad/bin/python -m lossgrad_server.engine.cpu_target
# Debian's packages are the same here as in the image.
COPY requirements/sbom.py ./
RUN /opt/lossgrad/bin/python sbom.py --system / --report locked.json --report torch.json --report libraries.json \
      > /opt/lossgrad/sbom.cdx.json


FROM base
COPY --from=dependencies /opt/lossgrad /opt/lossgrad
COPY --from=package /package /
COPY --from=kernels /opt/lossgrad/kernels /opt/lossgrad/kernels
COPY --from=kernels /opt/lossgrad/sbom.cdx.json /opt/lossgrad/sbom.cdx.json

# The root is read-only and /tmp is the only place to write: no bytecode, and Triton's compiled kernels go there.
ENV PATH=/opt/lossgrad/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NUMBA_CACHE_DIR=/opt/lossgrad/kernels \
    TRITON_CACHE_DIR=/tmp/triton
# No MALLOC_ variables: the server tells glibc itself to keep large blocks (lossgrad_api/allocator.py). Setting them too
# changed neither page faults nor CPU per call, at 1, 8 and 64 MiB.
# From outside a container only what listens on all addresses is reached; which ports are published is the operator's
# choice, and docker-compose.yml publishes on the loopback only. Change the port by variable, not by flag: the health
# check reads it too.
ENV LOSSGRAD_HOST=0.0.0.0 \
    LOSSGRAD_PORT=50051 \
    LOSSGRAD_METRICS_HOST=0.0.0.0 \
    LOSSGRAD_METRICS_PORT=8002
# A call that arrives in the very moment in which gRPC stops is cut off: without a delay 3 of 8 stops under load broke
# one. Within this second clients see by the health service that they should go elsewhere; with it no stop broke any.
ENV LOSSGRAD_DRAIN_DELAY_SECONDS=1

USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 8002
STOPSIGNAL SIGTERM
# A shell, so that the probe follows LOSSGRAD_PORT. Importing torch takes seconds, more with CUDA: so the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "lossgrad ping --target 127.0.0.1:${LOSSGRAD_PORT} || exit 1"]
ENTRYPOINT ["tini", "--", "lossgrad-server"]

ARG LOSSGRAD_VERSION=
ARG LOSSGRAD_REVISION=
LABEL org.opencontainers.image.title="lossgrad" \
      org.opencontainers.image.description="Regression losses and their gradients as a gRPC service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${LOSSGRAD_VERSION}" \
      org.opencontainers.image.revision="${LOSSGRAD_REVISION}"
