"""The Helm chart: rendered by helm itself, held against Kubernetes' schemas; what must fit together does."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from engines.triton.client import check_address
from engines.triton.repository import Serving
from nova_export import __version__
from nova_export.cli_triton import health

pytestmark = pytest.mark.kubernetes

KUBERNETES = Path(__file__).parents[2] / "engines" / "triton" / "kubernetes"
CHART = KUBERNETES / "chart"
IMAGE = ("image.repository=registry/nova-triton",)
CLAIM = (*IMAGE, "modelRepository.existingClaim=models")
COPIED = (*IMAGE, "modelRepository.image=registry/models:3")
ALL = (*CLAIM, "autoscaling.enabled=true", "modelRepository.subPath=nova", "serverArgs={--log-verbose=1}",
       "env[0].name=A", "env[0].value=b", "nodeSelector.gpu=l4", "imagePullSecrets[0].name=secret",
       "service.annotations.a=b")  # fmt: skip
VERSIONS = ("1.27", "1.31", "1.37")  # of Kubernetes: the oldest that the chart is for, to the newest known


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["helm", *map(str, arguments)], capture_output=True, text=True)


def rendered(*values: str, version: str = "1.31") -> dict[str, Any]:
    """Objects by kind."""
    import yaml

    sets = [word for value in values for word in ("--set", value)]
    done = helm("template", "web", CHART, "--kube-version", version, *sets)
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    assert len({each["kind"] for each in objects}) == len(objects)
    return {each["kind"]: each for each in objects}


def pod_of(objects: dict[str, Any]) -> Any:
    return objects["Deployment"]["spec"]["template"]["spec"]


def container_of(objects: dict[str, Any]) -> Any:
    [container] = pod_of(objects)["containers"]
    return container


@pytest.mark.parametrize("values", [CLAIM, COPIED, ALL], ids=["claim", "image", "all"])
def test_lint(values: tuple[str, ...]) -> None:
    done = helm("lint", "--strict", CHART, *(word for value in values for word in ("--set", value)))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [CLAIM, COPIED, ALL], ids=["claim", "image", "all"])
def test_schemas(values: tuple[str, ...], version: str) -> None:
    import kubernetes_validate

    for each in rendered(*values, version=version).values():
        kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_find_a_wrong_field() -> None:
    import kubernetes_validate

    objects = rendered(*CLAIM)
    container_of(objects)["ressources"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="ressources"):
        kubernetes_validate.validate(objects["Deployment"], "1.31", strict=True)


def test_versions() -> None:
    import yaml

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert container_of(rendered(*CLAIM))["image"] == f"registry/nova-triton:{__version__}"


def test_all_select_the_pods() -> None:
    objects = rendered(*ALL)
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector and selector.items() <= labels.items()
    names = {each["metadata"]["name"] for each in objects.values()}
    assert names == {objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]}


def test_ports() -> None:
    """Those of the server, its probes, the Service and the NetworkPolicy are the same."""
    objects = rendered(*CLAIM)
    container = container_of(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {f"--{name}-port={port}" for name, port in ports.items()} <= set(container["args"])
    assert {port["name"]: port["port"] for port in objects["Service"]["spec"]["ports"]} == ports
    assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} == set(ports)
    allowed = [port["port"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert sorted(allowed) == sorted(ports)
    assert objects["NetworkPolicy"]["spec"]["egress"] == []
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/v2/models/nova/ready", "port": "http"}


def test_liveness_is_an_inference() -> None:
    command = ["nova-export", "triton", "health", "127.0.0.1:8001", "--timeout=130"]
    probe = container_of(rendered(*CLAIM))["livenessProbe"]
    assert probe["exec"]["command"] == [*command, "--recover"]
    given = health.make_context("health", [*command[3:], "--recover"]).params
    check_address(given["url"])
    assert given["timeout"] > Serving().timeout  # of the queue, in which it waits too
    assert probe["timeoutSeconds"] > 3 * given["timeout"]  # it, loading, and it again
    without = rendered(*CLAIM, "liveness.recover=false")
    assert container_of(without)["livenessProbe"]["exec"]["command"] == command


@pytest.mark.parametrize("values", [CLAIM, COPIED], ids=["claim", "image"])
def test_no_more_rights_than_needed(values: tuple[str, ...]) -> None:
    pod = pod_of(rendered(*values))
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False and rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
    [server] = pod["containers"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in server["volumeMounts"]}
    assert mounts == {"/models": True, "/dev/shm": False, "/cache": False, "/tmp": False}
    home = {each["name"]: each["value"] for each in server["env"]}
    assert all(path.startswith("/cache") for path in home.values())


def test_the_repository_is_copied_past_its_own_mount() -> None:
    """Mounted over the image's folder, the volume would hide what is to be copied."""
    pod = pod_of(rendered(*COPIED))
    [copy] = pod["initContainers"]
    [mount] = copy["volumeMounts"]
    assert copy["command"] == ["cp", "-r", "/models/.", mount["mountPath"]]
    assert mount["mountPath"] != "/models"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "emptyDir" in volumes[mount["name"]] and mount["name"] == "models"


def test_stopping_takes_longer_than_the_server_waits() -> None:
    objects = rendered(*CLAIM, "shutdownSeconds=300")
    assert "--exit-timeout-secs=300" in container_of(objects)["args"]
    assert pod_of(objects)["terminationGracePeriodSeconds"] > 300


def test_a_gpu_each() -> None:
    limits = container_of(rendered(*CLAIM))["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1 and "memory" in limits


def test_the_autoscaler_alone_counts_replicas() -> None:
    assert rendered(*CLAIM, "replicas=5")["Deployment"]["spec"]["replicas"] == 5
    objects = rendered(*ALL)
    assert "replicas" not in objects["Deployment"]["spec"]
    [metric] = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "nv_inference_pending_request_count"
    assert "HorizontalPodAutoscaler" not in rendered(*CLAIM)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((*IMAGE,), "give existingClaim, or an image"),
        ((*CLAIM, "modelRepository.image=x"), "existingClaim and image are both given"),
        (("modelRepository.existingClaim=models",), "image.repository: name the image"),
        ((*CLAIM, "replicas=many"), "replicas"),
        ((*CLAIM, "replica=3"), "replica"),
        ((*CLAIM, "autoscaling.target=-"), "target"),
        ((*CLAIM, "shutdownSeconds=soon"), "shutdownSeconds"),
    ],
)
def test_wrong_values(values: tuple[str, ...], words: str) -> None:
    done = helm("template", "web", CHART, *(word for value in values for word in ("--set", value)))
    assert done.returncode != 0 and words in done.stderr


def test_the_dockerfile_copies_what_there_is() -> None:
    """And all that the package is made of."""
    root = KUBERNETES.parents[2]
    lines = (KUBERNETES / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert copied and all((root / name).exists() for name in copied)
    assert {"calibration", "engines", "nova_export", "reference_model", "pyproject.toml"} <= set(copied)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000:1000"]
