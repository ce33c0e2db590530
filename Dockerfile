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

ARG PYTHON_VERSION=3.12


# Python, pip in an environment of its own, and an empty environment to fill: /opt/lossgrad has no pip of its own.
FROM python:${PYTHON_VERSION}-slim-bookworm AS build
# tini's version is Debian's: a pinned one vanishes from the mirrors with the next point release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/build && python -m venv --without-pip /opt/lossgrad
WORKDIR /build
COPY constraints.txt ./


# Everything that is not ours, at the pinned versions. Changes seldom, so it is built, pushed and pulled seldom.
FROM build AS dependencies
ARG TORCH_FLAVOR=cpu
ARG TORCH_INDEX_URL=
# With an address the flavour is part of the version asked for (2.13.0+cpu), so no other index can answer in its place.
# pip compiles to bytecode here, because the running container cannot write any and would compile torch at every start.
RUN --mount=type=cache,target=/root/.cache/pip \
    torch="$(grep -E '^torch==' constraints.txt)" \
    && if [ -n "${TORCH_INDEX_URL}" ]; then \
         set -- --extra-index-url "${TORCH_INDEX_URL}" "${torch}+${TORCH_FLAVOR}"; \
       else \
         set -- "${torch}"; \
       fi \
    && /opt/build/bin/pip --python /opt/lossgrad/bin/python install --constraint constraints.txt "$@"
# A GPU image that cannot use a GPU is refused; a CPU image that is larger than it need be is only pointed out.
RUN built="$(/opt/lossgrad/bin/python -W ignore -c \
      'import torch; cuda = torch.version.cuda; print("cu" + cuda.replace(".", "") if cuda else "cpu")')" \
    && echo "torch is built for ${built}, TORCH_FLAVOR is ${TORCH_FLAVOR}" \
    && if [ "${built}" != "${TORCH_FLAVOR}" ]; then \
         echo "pass --build-arg TORCH_INDEX_URL with the index that has torch's ${TORCH_FLAVOR} wheels" >&2; \
         [ "${TORCH_FLAVOR}" = cpu ]; \
       fi
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/python -c 'import tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; extras = project["optional-dependencies"]; \
print(*project["dependencies"], *extras["server"], *extras["cli"], sep="\n")' > requirements.txt \
    && /opt/build/bin/pip --python /opt/lossgrad/bin/python install \
         --constraint constraints.txt --requirement requirements.txt


# lossgrad itself, as a small layer that lands on top of the dependencies.
FROM build AS package
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip install --constraint constraints.txt hatchling
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


FROM python:${PYTHON_VERSION}-slim-bookworm
# The account has a name because torch asks for the user's name, and a fixed number so that Kubernetes can check it.
RUN groupadd --gid 10001 lossgrad \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin lossgrad
# tini is process 1, because the kernel drops a SIGTERM that process 1 has no handler for: without it, stopping a server
# that is still importing torch takes the whole grace period. It also reaps orphaned processes. Docker's own --init
# would do as well, but it is the operator's to give, and Kubernetes has none.
COPY --from=build /usr/bin/tini-static /usr/bin/tini
COPY --from=dependencies /opt/lossgrad /opt/lossgrad
COPY --from=package /package /
COPY --from=kernels /opt/lossgrad/kernels /opt/lossgrad/kernels

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
