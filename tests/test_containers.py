"""The containers' files agree with each other and with the code: image, compose, Prometheus, Grafana.

Nothing is built or run here and no Docker is needed; that is deploy/check-containers.sh. A tool that is not installed
skips its test and says so.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import lossgrad_server
from lossgrad_server import config

ROOT = Path(__file__).parents[1]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
COMPOSE_FILES = [ROOT / "docker-compose.yml", ROOT / "docker-compose.gpu.yml"]


def tool(name: str) -> str:
    """Return the path of a command, from beside this Python or from PATH; skip the test if there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path) -> None:
    """Run a command; fail the test with what it wrote if it does not end with 0."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


# ---- The Dockerfile ----


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions: the word, and the rest of it on one line."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def last_stage() -> dict[str, list[str]]:
    """Return the instructions of the image that is shipped, by word."""
    everything = instructions()
    start = max(index for index, (word, _) in enumerate(everything) if word == "FROM")
    stage: dict[str, list[str]] = {}
    for word, rest in everything[start:]:
        stage.setdefault(word, []).append(rest)
    return stage


def image_environment() -> dict[str, str]:
    """Return the environment variables that the image sets."""
    return dict(pair.split("=", 1) for line in last_stage()["ENV"] for pair in line.split())


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    run(tool("hadolint"), "--config", "/dev/null", ROOT / "Dockerfile")


def test_the_image_runs_the_server_as_nobody_under_an_init_without_a_shell() -> None:
    stage = last_stage()
    assert stage["USER"] == ["10001:10001"]  # a number, so that Kubernetes can see that it is not root
    entry_point = json.loads(stage["ENTRYPOINT"][0])
    assert entry_point == ["tini", "--", "lossgrad-server"]
    assert stage["STOPSIGNAL"] == ["SIGTERM"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entry_point[-1] in scripts
    assert "lossgrad ping" in stage["HEALTHCHECK"][0]
    assert "lossgrad" in scripts


def test_the_image_exposes_the_ports_that_the_server_listens_on() -> None:
    environment = image_environment()
    ports = [environment["LOSSGRAD_PORT"], environment["LOSSGRAD_METRICS_PORT"]]
    assert last_stage()["EXPOSE"] == [" ".join(ports)]
    defaults = config.ServerConfig()
    assert ports == [str(defaults.port), str(defaults.metrics_port)]


def test_every_base_image_is_pinned_to_a_version() -> None:
    stages: set[str] = set()
    for word, rest in instructions():
        if word == "FROM":
            image, *name = rest.split()
            assert image in stages or image == "python:${PYTHON_VERSION}-slim-bookworm${PYTHON_DIGEST}", image
            stages.update(name[1:])
    assert ("ARG", "PYTHON_VERSION=3.12") in instructions()
    assert ("ARG", "PYTHON_DIGEST=") in instructions()


def test_the_build_takes_locked_files_and_no_index_of_its_own() -> None:
    arguments = [rest for word, rest in instructions() if word == "ARG"]
    assert "TORCH_FLAVOR=cpu" in arguments
    assert "TORCH_INDEX_URL=" in arguments  # no address: nothing here names a registry's host
    commands = [part.strip() for word, rest in instructions() if word == "RUN" for part in rest.split("&&")]
    installs = [command for command in commands if re.search(r"/pip .*\binstall\b", command)]
    locked = [install for install in installs if "--require-hashes --no-deps --only-binary :all:" in install]
    assert {install.rpartition(" ")[2] for install in locked} == {"image.txt", "build.txt"}
    torch, libraries, ours = (install for install in installs if install not in locked)
    assert "--no-deps" in torch
    assert torch.endswith("--requirement torch.txt")  # which has the hash, where TORCH_SHA256 is given
    assert "--constraint constraints.txt" in libraries
    assert "--no-index" in ours
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_what_the_build_copies_exists_and_is_not_ignored() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = [
        path for word, rest in instructions() if word == "COPY" and "--from" not in rest for path in rest.split()[:-1]
    ]
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
        ignored = False
        parts = (path, *(str(folder) for folder in Path(path).parents))
        for pattern in patterns:  # the last that matches it, or a folder that it is in, decides, as Docker does
            if any(fnmatch(part, pattern.removeprefix("!")) for part in parts):
                ignored = not pattern.startswith("!")
        assert not ignored, f".dockerignore keeps {path} from the build"


# ---- Compose ----


def resolved(text: str) -> str:
    """Put the defaults in the place of `${NAME:-default}`, as compose does where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def merged(base: Any, override: Any) -> Any:
    """Return what compose makes of a file and its override: mappings merge, lists append, the rest is replaced."""
    if isinstance(base, dict) and isinstance(override, dict):
        return {key: merged(base.get(key), override[key]) if key in override else base[key] for key in base | override}
    if isinstance(base, list) and isinstance(override, list):
        return base + override
    return override


def compose(*files: Path) -> dict[str, Any]:
    """Return what compose reads in these files."""
    result: Any = {}
    for file in files:
        result = merged(result, yaml.safe_load(resolved(file.read_text())))
    assert isinstance(result, dict)
    return result


STACKS = [pytest.param(COMPOSE_FILES[:1], id="cpu"), pytest.param(COMPOSE_FILES, id="gpu")]


def test_compose_files_and_their_sum_follow_the_compose_specification(tmp_path: Path) -> None:
    together = tmp_path / "docker-compose.yml"
    together.write_text(yaml.safe_dump(compose(*COMPOSE_FILES)))
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *COMPOSE_FILES, together)


@pytest.mark.parametrize("files", STACKS)
def test_docker_compose_itself_reads_them(files: list[Path]) -> None:
    docker = tool("docker")
    found = subprocess.run([docker, "compose", "version"], capture_output=True, text=True, check=False, timeout=60)
    if found.returncode:
        pytest.skip(f"docker compose is not installed: {found.stderr.strip().splitlines()[:1]}")
    run(docker, "compose", *(part for file in files for part in ("--file", file)), "config", "--quiet")


@pytest.mark.parametrize("files", STACKS)
def test_compose_publishes_on_the_loopback_only(files: list[Path]) -> None:
    published = {name: service.get("ports", []) for name, service in compose(*files)["services"].items()}
    assert published["lossgrad"] == ["127.0.0.1:50051:50051", "127.0.0.1:8002:8002"]
    for name, ports in published.items():
        for port in ports:
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{name} publishes {port}"


@pytest.mark.parametrize("files", STACKS)
def test_compose_confines_every_service(files: list[Path]) -> None:
    stack = compose(*files)
    assert set(stack["services"]) == {"lossgrad", "prometheus", "grafana"}
    for name, service in stack["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert not {"cap_add", "privileged", "network_mode", "pid"} & set(service), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert any(mount.startswith("/tmp:size=") for mount in service["tmpfs"]), name
        assert {"memory", "pids"} <= set(service["deploy"]["resources"]["limits"]), name
        assert {"healthcheck", "restart"} <= set(service), name
        for mount in service.get("volumes", []):
            source, _, rest = mount.partition(":")
            assert source in stack["volumes"] or rest.endswith(":ro"), f"{name} may write to {source}"
            assert source in stack["volumes"] or (ROOT / source).is_dir(), f"{source} does not exist"


@pytest.mark.parametrize("files", STACKS)
def test_compose_pins_every_image(files: list[Path]) -> None:
    for name, service in compose(*files)["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"]), f"{name}: {service['image']}"


@pytest.mark.parametrize("files", STACKS)
def test_compose_builds_the_version_that_is_here(files: list[Path]) -> None:
    service = compose(*files)["services"]["lossgrad"]
    assert service["image"].partition(":")[2].partition("-")[0] == lossgrad_server.__version__
    assert service["build"]["args"]["LOSSGRAD_VERSION"] == lossgrad_server.__version__
    arguments = {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}
    assert set(service["build"]["args"]) <= arguments


def test_the_gpu_override_asks_for_a_gpu_and_fails_without_one() -> None:
    service = compose(*COMPOSE_FILES)["services"]["lossgrad"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["environment"]["LOSSGRAD_DEVICE"] == "cuda:0"
    # Triton loads what it has compiled, which Docker forbids in a tmpfs that does not say exec.
    (cache,) = (mount for mount in service["tmpfs"] if mount.startswith(service["environment"]["TRITON_CACHE_DIR"]))
    assert "exec" in cache.partition(":")[2].split(",")
    assert service["build"]["args"]["TORCH_FLAVOR"].startswith("cu")
    alone = compose(COMPOSE_FILES[0])["services"]["lossgrad"]
    assert service["image"] != alone["image"]
    assert "reservations" not in alone["deploy"]["resources"]


@pytest.mark.parametrize("files", STACKS)
def test_every_setting_in_image_and_compose_is_one_that_the_server_reads(files: list[Path]) -> None:
    known = {config.environment_variable(setting.name) for setting in dataclasses.fields(config.ServerConfig)}
    environment = {**image_environment(), **compose(*files)["services"]["lossgrad"]["environment"]}
    ours = {name: value for name, value in environment.items() if name.startswith("LOSSGRAD_")}
    assert set(ours) <= known
    parsed = config.from_command_line([], ours)
    assert (parsed.host, parsed.metrics_host) == ("0.0.0.0", "0.0.0.0")


def test_compose_waits_longer_than_the_server_drains() -> None:
    seconds = float(compose(COMPOSE_FILES[0])["services"]["lossgrad"]["stop_grace_period"].removesuffix("s"))
    server = config.from_command_line([], image_environment())
    assert seconds >= server.drain_delay_seconds + server.drain_grace_seconds + 5


def test_compose_leaves_room_for_the_bytes_that_the_server_admits() -> None:
    gib = float(
        compose(COMPOSE_FILES[0])["services"]["lossgrad"]["deploy"]["resources"]["limits"]["memory"].removesuffix("g")
    )
    defaults = config.ServerConfig()
    # The process itself, what is admitted, one batch packed, and messages that are received before they can be refused.
    needed = 512 * config.MIB + defaults.max_queued_bytes + defaults.max_batch_bytes + 4 * defaults.max_message_bytes
    assert gib * 1024 * config.MIB >= needed


@pytest.mark.parametrize(
    "path", ["Dockerfile", "docker-compose.yml", "docker-compose.gpu.yml", *Path(ROOT).glob("deploy/**/*")]
)
def test_no_file_names_a_host_outside(path: str | Path) -> None:
    file = ROOT / path
    if file.is_file():
        hosts = {host.partition(":")[0] for host in re.findall(r"https?://([^/\s\"'$)]+)", file.read_text())}
        assert hosts <= {"127.0.0.1", "localhost", "lossgrad", "prometheus", "prometheus.monitoring"}, hosts


# ---- Prometheus and Grafana ----


def prometheus_config() -> dict[str, Any]:
    """Return Prometheus' configuration."""
    result = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert isinstance(result, dict)
    return result


def test_prometheus_scrapes_the_server_where_compose_puts_it() -> None:
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in prometheus_config()["scrape_configs"]}
    port = compose(COMPOSE_FILES[0])["services"]["lossgrad"]["ports"][1].rpartition(":")[2]
    assert targets["lossgrad"] == [f"lossgrad:{port}"]


def test_promtool_accepts_the_configuration() -> None:
    run(tool("promtool"), "check", "config", ROOT / "deploy/prometheus/prometheus.yml")


def test_grafana_finds_its_data_source_and_dashboards() -> None:
    service = compose(COMPOSE_FILES[0])["services"]["grafana"]
    mounts = dict(mount.removesuffix(":ro").split(":") for mount in service["volumes"])
    provisioning = ROOT / "deploy/grafana/provisioning"
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards/lossgrad.yml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    home = service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy/grafana/dashboards" / Path(home).name).is_file()
    assert str(Path(home).parent) == provider["options"]["path"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == prometheus_config()["global"]["scrape_interval"]
    for path in DASHBOARDS:
        choices = {v["name"]: v for v in json.loads(path.read_text())["templating"]["list"]}
        assert choices["datasource"]["current"]["value"] == source["uid"]
