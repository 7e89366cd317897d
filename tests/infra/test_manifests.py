"""The manifests under infra/ say what the lock and the code say. What was tried of them is in infra/README.md."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from prefect.workers.process import ProcessJobConfiguration
from typer.main import get_command

from flows.cli import app
from infra.metrics import METRICS
from pipelines.spec import Spec

REPO = Path(__file__).parents[2]
INFRA = REPO / "infra"
COMPOSE = "infra/compose/compose.yaml"
CLUSTERS = ("infra/kuberay/raycluster.yaml", "infra/kuberay/rayjob.yaml")


@cache
def _text(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


@cache
def _yaml(name: str) -> Any:
    return yaml.safe_load(_text(name))


@cache
def _locked(package: str) -> str:
    pins = (Requirement(line) for line in _text("requirements.lock").splitlines() if not line.startswith("#"))
    return next(str(next(iter(pin.specifier)).version) for pin in pins if pin.name == package)


def _cluster(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = _yaml(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def _pods(name: str) -> list[dict[str, Any]]:
    cluster = _cluster(name)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def _manifests() -> list[str]:
    kinds = ("*.yaml", "*.json", "Dockerfile", ".env.example", "README.md")
    return [str(path.relative_to(REPO)) for kind in kinds for path in sorted(INFRA.rglob(kind))]


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_on_kubernetes_is_the_locked_one(name: str) -> None:
    assert _cluster(name)["rayVersion"] == _locked("ray")


def test_prefect_of_the_deployment_is_the_locked_one() -> None:
    assert _yaml("infra/prefect/prefect.yaml")["prefect-version"] == _locked("prefect")


def test_a_run_and_a_cluster_that_stays_are_of_one_shape() -> None:
    staying, passing = map(_cluster, CLUSTERS)
    assert staying == passing


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_head_runs_no_sample_and_has_time_to_finish(name: str) -> None:
    head = _cluster(name)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    pod = head["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 600
    assert "ditmill stop" in pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]


@pytest.mark.parametrize("name", CLUSTERS)
def test_gpu_workers_ask_for_gpus_on_spot_nodes_within_bounds(name: str) -> None:
    (group,) = _cluster(name)["workerGroupSpecs"]
    assert _cluster(name)["enableInTreeAutoscaling"]
    assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    pod = group["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
    assert {"nvidia.com/gpu", "spot"} <= {toleration["key"] for toleration in pod["tolerations"]}
    assert "spot" in pod["nodeSelector"].values()


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_pod_runs_one_image_as_nobody_with_one_cache(name: str) -> None:
    pods = _pods(name)
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for pod in pods:
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["cache"] == "/cache" and mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        claims = [
            volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] == "cache"
        ]
        assert claims == [_yaml("infra/kuberay/cache.yaml")["metadata"]["name"]]


@pytest.mark.parametrize("name", CLUSTERS)
def test_credentials_come_from_the_secret_and_stand_in_no_manifest(name: str) -> None:
    secret = _yaml("infra/kuberay/secret.example.yaml")
    for pod in _pods(name):
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    assert [key for key, value in secret["stringData"].items() if value and key != "DITMILL_DATASET"] == []


def test_the_run_goes_where_the_secret_says() -> None:
    (asked,) = re.findall(r"\$(\w+)", _yaml(CLUSTERS[1])["spec"]["entrypoint"])
    assert asked in _yaml("infra/kuberay/secret.example.yaml")["stringData"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_metrics_are_where_the_annotations_and_ports_say(name: str) -> None:
    cluster = _cluster(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        port = group["rayStartParams"]["metrics-export-port"]
        ports = {found["name"]: found["containerPort"] for found in group["template"]["spec"]["containers"][0]["ports"]}
        assert group["template"]["metadata"]["annotations"]["prometheus.io/port"] == port == str(ports["metrics"])


@pytest.mark.parametrize("name", _manifests())
def test_every_ditmill_command_in_a_manifest_is_one(name: str) -> None:
    """Command, options and, with them, that `ditmill` stands for the program."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(
        r"(?<![\w/.:-])ditmill ((?:run|plan|status|report|verify|stop|make)\b[^\n|`&;\]]*)", _text(name)
    ):
        command, *rest = line.rstrip("\\\"' ").split()
        known = {option for param in commands[command].params for option in param.opts}
        assert [word for word in rest if word.startswith("--") and word.rstrip("'\"") not in known] == []


def test_every_variable_of_ours_in_a_manifest_is_read_by_the_code() -> None:
    code = "\n".join(path.read_text("utf-8") for room in ("flows", "pipelines", "stages", "models", "infra")
                     for path in (REPO / room).rglob("*.py"))  # fmt: skip
    named = {word for name in _manifests() for word in re.findall(r"\bDITMILL_[A-Z_]+\b", _text(name))}
    assert {word for word in named if f'"{word}"' not in code} == {"DITMILL_DATASET"}  # the shell of the run's reads it


def test_no_service_starts_without_what_it_needs_and_no_secret_is_written_down() -> None:
    services = _yaml(COMPOSE)["services"]
    wanted = set(re.findall(r"\$\{(\w+)", _text(COMPOSE)))
    given = dict(line.split("=", 1) for line in _text("infra/compose/.env.example").splitlines() if line[:1].isalpha())
    assert wanted == given.keys()
    assert {name for name in given if f"${{{name}:?" in _text(COMPOSE)} == {
        name for name in given if name.endswith(("_TOKEN", "_KEY", "_PASSWORD")) and name != "HF_TOKEN"
    }
    assert [name for name in given if name.endswith(("_TOKEN", "_KEY", "_PASSWORD")) and given[name]] == []
    for service in services.values():
        for name, rule in service.get("depends_on", {}).items() if isinstance(service.get("depends_on"), dict) else ():
            assert rule["condition"] != "service_healthy" or "healthcheck" in services[name]


def test_services_are_reached_where_they_listen() -> None:
    services = _yaml(COMPOSE)["services"]
    assert "--port=6379" in services["ray-head"]["command"] and "--num-cpus=0" in services["ray-head"]["command"]
    for name in ("ray-worker", "prefect-worker"):
        assert "--address=ray-head:6379" in services[name]["command"]
    assert services["prefect-worker"]["environment"]["PREFECT_API_URL"] == "http://prefect-server:4200/api"
    assert "--port 4200" in services["prefect-server"]["command"]
    scraped = {job["job_name"]: job for job in _yaml("infra/compose/prometheus.yaml")["scrape_configs"]}
    (found,) = scraped["ray"]["file_sd_configs"][0]["files"]
    assert f"ray:{Path(found).parent}:ro" in services["prometheus"]["volumes"]
    assert "ray:/tmp/ray" in services["ray-head"]["volumes"]
    assert scraped["prefect-server"]["static_configs"][0]["targets"] == ["prefect-server:4200"]


def test_ports_are_open_to_this_machine_only() -> None:
    ports = [port for service in _yaml(COMPOSE)["services"].values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_what_compose_mounts_from_here_is_here() -> None:
    mounts = [
        mount.split(":")[0] for service in _yaml(COMPOSE)["services"].values() for mount in service.get("volumes", ())
    ]
    assert [mount for mount in mounts if mount.startswith(".") and not (INFRA / "compose" / mount).exists()] == []
    assert {mount for mount in mounts if not mount.startswith(".")} == _yaml(COMPOSE)["volumes"].keys()


def test_the_image_holds_the_five_packages_and_the_locked_requirements() -> None:
    project = tomllib.loads(_text("pyproject.toml"))
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+)$", _text("infra/docker/Dockerfile"), re.M)
              for word in shlex.split(line)[:-1]}  # fmt: skip
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert copied == packages | {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "requirements.lock",
        "requirements-telemetry.lock",
    }
    let_in = {line[1:] for line in _text(".dockerignore").splitlines() if line.startswith("!")}
    assert let_in == copied
    assert project["project"]["requires-python"] == ">=3.11,<3.13" and "ARG PYTHON=3.11" in _text(
        "infra/docker/Dockerfile"
    )


def test_the_work_pool_fills_what_a_process_is_started_with() -> None:
    template = json.loads(_text("infra/prefect/work-pool.json"))
    assert template["job_configuration"].keys() == ProcessJobConfiguration.model_fields.keys()
    filled = {value.strip("{} ") for value in template["job_configuration"].values()}
    assert filled == template["variables"]["properties"].keys()
    defaults = {name: field.get("default") for name, field in template["variables"]["properties"].items()}
    made = ProcessJobConfiguration(**{name: value for name, value in defaults.items() if value is not None})
    assert made.env["MKL_CBWR"] == "AUTO,STRICT" and str(made.working_dir) == "/app"


def test_the_deployment_is_of_the_flow_with_a_spec_that_holds() -> None:
    from flows.synthesize import synthesize

    (deployment,) = _yaml("infra/prefect/prefect.yaml")["deployments"]
    assert deployment["entrypoint"] == f"flows/synthesize.py:{synthesize.__name__}"
    assert deployment["work_pool"]["name"] in _yaml(COMPOSE)["services"]["prefect-worker"]["command"]
    spec = Spec.model_validate(deployment["parameters"]["spec"])
    assert spec.compute.ray_address == "auto" and (REPO / str(spec.prompts.path)).is_file()


def test_the_dashboard_asks_for_the_metrics_that_there_are() -> None:
    dashboard = json.loads(_text("infra/grafana/ditmill.json"))
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert set(re.findall(r"\bray_(ditmill_\w+)", asked)) == {metric.name for metric in METRICS}
    labels = {"dataset", *(label for metric in METRICS for label in metric.labels)}
    assert set(re.findall(r"(\w+)=~?\"", asked)) | set(re.findall(r"by \((\w+)\)", asked)) == labels
