#!/usr/bin/env bash
# Builds the image with buildah, runs it with podman as docker-compose.yml does, and checks what deploy/README.md says.
# Prints each check with its figure; exits with 1 if one fails. Needs root, Linux, buildah, podman, runc and netavark,
# and the development environment (`make setup`), whose SDK is the caller from outside. Not part of `make test`.
#
#   sudo deploy/check-containers.sh
#
# What can be set, all by environment variable:
#   PYTHON_VERSION   the image's Python (3.12). The base image is taken if it is there, pulled if it can be; failing
#                    both, it is made with mmdebstrap from Debian's own packages, which have Python 3.11 only
#   TORCH_FLAVOR, TORCH_INDEX_URL, TORCH_SHA256   the Dockerfile's build arguments
#   PIP_CONF, CA_BUNDLE             pip's configuration and the certificates for the build, if it needs its own
#   BUILD_VOLUMES    more to mount for the build, read-only and at the same place, separated by colons: local wheels
#   BIN              where the SDK's Python and `lossgrad` are (.venv/bin)
#   SIZE_LIMIT_MB    what a CPU image may take (1300)
#   PODMAN_COMPOSE   the podman-compose to use, if it is not on PATH
# Compose is checked too where podman-compose and Debian's prometheus are installed: this Prometheus stands in for the
# image of docker-compose.yml, and every expression of the dashboards is asked of it. Grafana itself is left out.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON_VERSION=${PYTHON_VERSION:-3.12}
TORCH_FLAVOR=${TORCH_FLAVOR:-cpu}
SIZE_LIMIT_MB=${SIZE_LIMIT_MB:-1300}
BIN=$(cd "${BIN:-.venv/bin}" && pwd)
BASE="python:${PYTHON_VERSION}-slim-bookworm"
IMAGE=localhost/lossgrad:check
NAME="lossgrad-check-$$"
WORK=$(mktemp -d)
FAILED=0

clean_up() {
  podman rm --force --time 5 "${NAME}" >/dev/null 2>&1 || true
  if [[ -e "${WORK}/docker-compose.yml" ]]; then compose down --volumes >/dev/null 2>&1 || true; fi
  rm -rf "${WORK}"
}
trap clean_up EXIT

passed() { printf 'ok      %-40s %s\n' "$1" "${2:-}"; }
skipped() { printf 'skipped %-40s %s\n' "$1" "${2:-}"; }
failed() {
  printf 'FAILED  %-40s %s\n' "$1" "${2:-}"
  FAILED=1
}
# equal NAME WANTED FOUND
equal() { if [[ "$2" == "$3" ]]; then passed "$1" "$3"; else failed "$1" "is $3, should be $2"; fi; }
# at_most NAME LIMIT FOUND UNIT
at_most() {
  if awk "BEGIN { exit !($3 <= $2) }"; then passed "$1" "$3 $4 (at most $2)"; else failed "$1" "$3 $4, at most $2"; fi
}
# succeeds NAME COMMAND...: the command must end with 0; its output is the figure
succeeds() {
  local name=$1 output
  shift
  if output=$("$@" 2>&1); then passed "${name}" "${output}"; else failed "${name}" "${output}"; fi
}
# refused NAME COMMAND...: the command must fail
refused() {
  local name=$1
  shift
  if "$@" >/dev/null 2>&1; then failed "${name}" "was allowed"; else passed "${name}" "refused"; fi
}
now() { date +%s.%N; }
since() { awk "BEGIN { printf \"%.1f\", $(now) - $1 }"; }
# Without systemd podman complains at every step that nothing runs its health checks; we run them. Where a container runs out
# of memory, a file that says so is left in the folder that it was started from.
podman() { (cd "${WORK}" && command podman "$@") 2> >(grep -v 'unable to get systemd connection' >&2 || true); }
inspect() { podman inspect --format "$1" "${2:-${NAME}}"; }
client() { "${BIN}/python" deploy/check_from_outside.py "$@"; }

# Neither systemd nor cgroup v2 is needed: runc and the cgroup files do. Raising a limit on open files may be forbidden.
cat >"${WORK}/containers.conf" <<'CONF'
[containers]
default_ulimits = []
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_backend = "netavark"
CONF
export CONTAINERS_CONF="${WORK}/containers.conf" BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}

make_base() {
  local container
  # shellcheck disable=SC2016 # $1 is mmdebstrap's: the directory that it builds in
  mmdebstrap --quiet --variant=minbase --include=ca-certificates,netbase,tzdata,python3,python3-venv \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/*' bookworm "${WORK}/base.tar"
  container=$(buildah from scratch 2>/dev/null)
  buildah add --quiet "${container}" "${WORK}/base.tar" / >/dev/null
  buildah config --env PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 \
    --cmd python3 "${container}"
  buildah run "${container}" -- ln -s /usr/bin/python3 /usr/local/bin/python
  buildah commit --quiet --rm "${container}" "localhost/${BASE}" >/dev/null
  rm "${WORK}/base.tar"
}

find_base() {
  if buildah inspect --type image "${BASE}" >/dev/null 2>&1; then
    passed "base image" "${BASE} is there"
  elif timeout 300 buildah pull --quiet "${BASE}" >/dev/null 2>&1; then
    passed "base image" "${BASE} pulled"
  elif [[ "${PYTHON_VERSION}" == 3.11 ]] && command -v mmdebstrap >/dev/null; then
    make_base
    passed "base image" "${BASE} made from Debian's packages: no image registry answers"
  else
    failed "base image" "no registry has ${BASE}; with PYTHON_VERSION=3.11 and mmdebstrap it is made here"
    exit 1
  fi
}

build() {
  local volumes=() volume started size
  if [[ -n "${PIP_CONF:-}" ]]; then volumes+=(--volume "${PIP_CONF}:/etc/pip.conf:ro"); fi
  if [[ -n "${CA_BUNDLE:-}" ]]; then volumes+=(--volume "${CA_BUNDLE}:/etc/ssl/certs/ca-certificates.crt:ro"); fi
  for volume in $(tr : ' ' <<<"${BUILD_VOLUMES:-}"); do volumes+=(--volume "${volume}:${volume}:ro"); done
  started=$(now)
  if ! buildah build --layers --pull-never --format docker "${volumes[@]}" --tag "${IMAGE}" \
    --build-arg "PYTHON_VERSION=${PYTHON_VERSION}" --build-arg "TORCH_FLAVOR=${TORCH_FLAVOR}" \
    --build-arg "TORCH_INDEX_URL=${TORCH_INDEX_URL:-}" --build-arg "TORCH_SHA256=${TORCH_SHA256:-}" . >"${WORK}/build.log" 2>&1; then
    tail -n 40 "${WORK}/build.log" >&2
    failed "image builds"
    exit 1
  fi
  passed "image builds" "in $(since "${started}") s"
  size=$(($(podman image inspect --format '{{.Size}}' "${IMAGE}") / 1000000))
  if [[ "${TORCH_FLAVOR}" == cpu ]]; then
    at_most "image size" "${SIZE_LIMIT_MB}" "${size}" MB
  else
    passed "image size" "${size} MB"
  fi
  equal "image's user" 10001:10001 "$(podman image inspect --format '{{.User}}' "${IMAGE}")"
  equal "image's stop signal" SIGTERM "$(podman image inspect --format '{{.Config.StopSignal}}' "${IMAGE}")"
}

# start [PODMAN ARGUMENTS...]: confined as in docker-compose.yml, on free ports
start() {
  podman run --detach --name "${NAME}" --env LOSSGRAD_INSECURE=true --publish 127.0.0.1::50051 --publish 127.0.0.1::8002 --ulimit host \
    --health-interval disable --read-only --tmpfs /tmp:size=64m,mode=1777 --cap-drop all \
    --security-opt no-new-privileges --pids-limit 512 --env LOSSGRAD_DEVICE=cpu "$@" "${IMAGE}" >/dev/null
  TARGET=$(podman port "${NAME}" 50051/tcp)
  METRICS="http://$(podman port "${NAME}" 8002/tcp)/metrics"
}

wait_until_healthy() {
  local container=${1:-${NAME}} deadline=$((SECONDS + 60))
  until podman healthcheck run "${container}" >/dev/null 2>&1; do
    if ((SECONDS > deadline)); then
      podman logs --tail 20 "${container}" >&2 || true
      return 1
    fi
    sleep 0.2
  done
}

status_of_1() { podman exec "${1}" sed -n "s/^$2:[[:space:]]*//p" /proc/1/status; }

# cpu_seconds: what the server has taken of it since it started
cpu_seconds() {
  podman exec "${NAME}" sh -c 'cat /proc/[0-9]*/stat' 2>/dev/null |
    awk '$2 == "(lossgrad-server)" { print ($14 + $15) / 100; exit }'
}

check_confinement() {
  local started
  started=$(now)
  # numba says what it takes from the image's kernels, and what it compiles.
  start --env NUMBA_DEBUG_CACHE=1
  if ! wait_until_healthy; then
    failed "health check passes"
    exit 1
  fi
  passed "health check passes" "after $(since "${started}") s, $(cpu_seconds) s of CPU time"
  equal "process 1" tini "$(podman exec "${NAME}" cat /proc/1/comm)"
  equal "uid of process 1" 10001 "$(status_of_1 "${NAME}" Uid | cut -f 1)"
  equal "uid of every process" 10001 "$(podman exec "${NAME}" sh -c 'stat -c %u /proc/[0-9]*' 2>/dev/null | sort -u)"
  equal "capabilities it has" 0000000000000000 "$(status_of_1 "${NAME}" CapEff)"
  equal "capabilities it could get" 0000000000000000 "$(status_of_1 "${NAME}" CapBnd)"
  equal "no new privileges" 1 "$(status_of_1 "${NAME}" NoNewPrivs)"
  refused "a file in the root" podman exec "${NAME}" touch /file
  refused "a file beside the code" podman exec "${NAME}" touch /opt/lossgrad/file
  refused "a write to the root by root" podman exec --user 0 "${NAME}" sh -c 'echo >>/etc/passwd'
  succeeds "a file in /tmp" podman exec "${NAME}" sh -c 'touch /tmp/file && echo written'
}

# beta = 1: the losses of 1, 2, 3, 4 are 0.5, 1.5, 2.5, 3.5, and their mean is 2.
compute_on_the_command_line() {
  "${BIN}/python" -c 'import numpy, sys
numpy.save(sys.argv[1] + "/input.npy", numpy.array([1, 2, 3, 4], "f4"))
numpy.save(sys.argv[1] + "/target.npy", numpy.zeros(4, "f4"))' "${WORK}"
  local answer
  answer=$("${BIN}/lossgrad" compute --target "${TARGET}" "${WORK}/input.npy" "${WORK}/target.npy" 2>&1) || true
  tail -n 1 <<<"${answer}"
  grep -q 'mean: 2\.0 (4 elements)' <<<"${answer}"
}

check_service() {
  succeeds "the SDK from outside" client compute "${TARGET}"
  succeeds "the command line from outside" compute_on_the_command_line
  succeeds "the metrics from outside" client metrics "${METRICS}"
}

check_contents() {
  local log saved loaded
  podman exec "${NAME}" cat /opt/lossgrad/sbom.cdx.json >"${WORK}/sbom.cdx.json"
  succeeds "bill of materials" client sbom "${WORK}/sbom.cdx.json"
  equal "protobuf's implementation" upb "$(podman exec "${NAME}" python -c \
    'from google.protobuf.internal import api_implementation; print(api_implementation.Type())')"
  log=$(podman logs "${NAME}" 2>&1)
  loaded=$(grep -c '^\[cache\] data loaded' <<<"${log}" || true)
  saved=$(grep -c '^\[cache\] data saved' <<<"${log}" || true)
  if ((loaded > 0 && saved == 0)); then
    passed "kernels compiled at start" "none; ${loaded} loaded"
  else
    failed "kernels compiled at start" "${saved}; ${loaded} loaded"
  fi
}

# torch itself is loaded by this engine alone, and by a GPU's.
check_plain_engine() {
  start --env LOSSGRAD_ENGINE=plain
  if wait_until_healthy; then
    succeeds "torch's own operations (--engine plain)" client compute "${TARGET}"
  else
    failed "torch's own operations (--engine plain)" "does not start"
  fi
  podman rm --force --time 5 "${NAME}" >/dev/null
}

check_stop() {
  local started load
  client load "${TARGET}" >"${WORK}/load.txt" 2>&1 &
  load=$!
  sleep 5
  started=$(now)
  podman stop --time 60 "${NAME}" >/dev/null
  at_most "SIGTERM under load: stopped after" 45 "$(since "${started}")" s
  equal "SIGTERM under load: exit code" 0 "$(inspect '{{.State.ExitCode}}')"
  if wait "${load}"; then
    passed "SIGTERM under load: callers" "$(cat "${WORK}/load.txt")"
  else
    failed "SIGTERM under load: callers" "$(cat "${WORK}/load.txt")"
  fi
  podman rm --force "${NAME}" >/dev/null

  start
  sleep 0.3
  started=$(now)
  podman stop --time 30 "${NAME}" >/dev/null
  # Without tini this would be the 30 s that podman was told to wait.
  at_most "SIGTERM while it starts: stopped after" 10 "$(since "${started}")" s
  podman rm --force "${NAME}" >/dev/null
}

check_memory_limit() {
  local limit_mb=$1 seen restarts
  start --memory "${limit_mb}m" --memory-swap "${limit_mb}m" --restart on-failure:3
  if ! wait_until_healthy; then
    failed "memory limit of ${limit_mb} MiB: starts"
    return
  fi
  # shellcheck disable=SC2016
  seen=$(podman exec "${NAME}" sh -c \
    'cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes')
  equal "memory limit as the container sees it" "$((limit_mb * 1024 * 1024))" "${seen}"
  succeeds "memory limit: callers beyond it" client exhaust "${TARGET}"
  restarts=$(inspect '{{.RestartCount}}')
  if ((restarts > 0)); then
    passed "memory limit: killed and started again" "${restarts} times"
  else
    failed "memory limit: killed and started again" "never: the limit was not reached"
  fi
  succeeds "memory limit: healthy afterwards" wait_until_healthy
  succeeds "memory limit: right afterwards" client compute "${TARGET}"
  podman rm --force --time 5 "${NAME}" >/dev/null
}

# Debian's Prometheus under the name of the image that compose asks for, with as much of wget as its health check uses.
make_prometheus() {
  local container image=$1
  printf '%s\n' '#!/usr/bin/env python' 'import sys, urllib.request' 'urllib.request.urlopen(sys.argv[-1], timeout=4)' \
    >"${WORK}/wget"
  chmod +x "${WORK}/wget"
  container=$(buildah from --pull-never "${BASE}" 2>/dev/null)
  buildah copy --quiet "${container}" "$(command -v prometheus)" /bin/prometheus >/dev/null
  buildah copy --quiet "${container}" "${WORK}/wget" /bin/wget >/dev/null
  buildah run "${container}" -- sh -c 'mkdir /prometheus /etc/prometheus && chown 65534:65534 /prometheus'
  buildah config --user 65534 --cmd '[]' --entrypoint '["/bin/prometheus"]' "${container}" 2>/dev/null
  buildah commit --quiet --rm "${container}" "localhost/${image}" >/dev/null 2>&1
}

compose() {
  "${COMPOSE}" --podman-run-args '--ulimit host' --file "${WORK}/docker-compose.yml" --project-name "${NAME}" "$@"
}

check_compose() {
  COMPOSE=${PODMAN_COMPOSE:-$(command -v podman-compose || true)}
  if [[ -z "${COMPOSE}" ]] || ! command -v prometheus >/dev/null; then
    skipped "compose" "needs podman-compose and prometheus"
    return
  fi
  # docker-compose.yml itself, save for its limit on open files, because raising one may be forbidden here.
  "${BIN}/python" - docker-compose.yml "${WORK}/docker-compose.yml" <<'PYTHON'
import pathlib
import sys

import yaml

stack = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
for service in stack["services"].values():
    service.pop("ulimits", None)
    volumes = service.get("volumes", [])
    service["volumes"] = [f"{pathlib.Path.cwd()}/{name}" if name.startswith("./") else name for name in volumes]
pathlib.Path(sys.argv[2]).write_text(yaml.safe_dump(stack))
PYTHON
  local server="${NAME}_lossgrad_1" prometheus="${NAME}_prometheus_1" service found started ports
  make_prometheus "$(sed -n 's/^ *image: \(prom.*\)/\1/p' docker-compose.yml)"
  podman tag "${IMAGE}" "localhost/$(sed -n 's/^ *image: \(lossgrad.*\)/\1/p' docker-compose.yml)"
  read -r -a ports < <("${BIN}/python" -c 'import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')
  export LOSSGRAD_PUBLISHED_PORT=${ports[0]} LOSSGRAD_PUBLISHED_METRICS_PORT=${ports[1]}
  export PROMETHEUS_PUBLISHED_PORT=${ports[2]}
  started=$(now)
  compose up --no-build --detach lossgrad prometheus >"${WORK}/compose.log" 2>&1 || true
  if ! wait_until_healthy "${server}" || ! wait_until_healthy "${prometheus}"; then
    failed "compose: server and Prometheus healthy" "$(tail -n 5 "${WORK}/compose.log")"
    return
  fi
  passed "compose: server and Prometheus healthy" "after $(since "${started}") s"
  for service in lossgrad prometheus; do
    found=$(inspect '{{.HostConfig.ReadonlyRootfs}} {{join .HostConfig.SecurityOpt ","}}' "${NAME}_${service}_1")
    equal "compose: ${service} confined" "true no-new-privileges 0000000000000000" \
      "${found} $(status_of_1 "${NAME}_${service}_1" CapBnd)"
    equal "compose: ${service} published on" 127.0.0.1 \
      "$(podman port "${NAME}_${service}_1" | sed 's/.*-> \(.*\):.*/\1/' | sort -u)"
  done
  succeeds "compose: dashboards" client dashboards "127.0.0.1:${ports[0]}" "http://127.0.0.1:${ports[2]}"
  compose stop --timeout 45 lossgrad >>"${WORK}/compose.log" 2>&1
  equal "compose: the server's exit code" 0 "$(inspect '{{.State.ExitCode}}' "${server}")"
  compose down --volumes >>"${WORK}/compose.log" 2>&1
}

find_base
build
check_confinement
check_service
check_contents
check_stop
check_plain_engine
check_memory_limit 256
check_compose

if ((FAILED)); then
  echo "some checks failed"
  exit 1
fi
echo "all checks passed"
