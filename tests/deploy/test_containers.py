"""Container and Kubernetes files: no container is built and no cluster asked here; what can be read from them fits."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import yaml

from deploy.packages.programs import PROGRAMS
from process_server.settings import ProcessServerSettings
from runtime.settings import environment_prefix, known_keys, load
from tests.deploy.needed_tools import DEPLOY

INSTRUCTIONS = {"FROM", "RUN", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}
MANIFEST = DEPLOY / "kubernetes/process-server.yaml"


def instructions() -> Iterator[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, continued lines joined."""
    text = (DEPLOY / "containers/Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, words = line.partition(" ")
            yield name, words.strip()


def stages() -> dict[str, dict[str, list[str]]]:
    """By stage: its instructions' words by instruction."""
    found: dict[str, dict[str, list[str]]] = {}
    stage = ""
    for name, words in instructions():
        assert name in INSTRUCTIONS, f"{name} {words}"
        if name == "FROM":
            stage = words.rpartition(" AS ")[2]
            assert stage not in found
            found[stage] = {}
        found[stage].setdefault(name, []).append(words)
    return found


def manifests() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text("utf-8"))}


def test_the_dockerfile_has_a_target_for_each_program_made_of_its_package() -> None:
    found = stages()
    assert set(found) == {"base", *(program.name for program in PROGRAMS)}
    assert found["base"]["FROM"] == ["debian:12-slim AS base"]
    for program in PROGRAMS:
        stage = found[program.name]
        assert stage["FROM"] == [f"base AS {program.name}"]
        assert f"dpkg --install /dist/{program.package_name}_*.deb" in stage["RUN"][-1]
        assert json.loads(stage["ENTRYPOINT"][0]) == [program.command]
        assert json.loads(stage["CMD"][0])


def test_nothing_in_a_container_runs_as_root_but_the_agent() -> None:
    for name, stage in stages().items():
        if name not in ("base", "mobility-agent"):
            uid, gid = re.fullmatch(r"(\d+):(\d+)", stage["USER"][0]).groups()  # type: ignore[union-attr]
            assert f"groupadd --gid {gid} " in stage["RUN"][0]
            assert f"useradd --uid {uid} --gid {gid} " in stage["RUN"][0]


def test_the_compose_file_uses_what_is_there() -> None:
    compose = yaml.safe_load((DEPLOY / "containers/compose.yaml").read_text("utf-8"))
    services = compose["services"]
    build = services["site"]["build"]
    assert build["target"] in stages()
    assert (
        DEPLOY / "containers" / build["context"] / build["dockerfile"]
    ).resolve() == DEPLOY / "containers/Dockerfile"
    for service in services.values():
        named = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert named <= set(compose["volumes"])
        assert set(service.get("depends_on", {})) <= set(services)
    assert services["postgresql"]["profiles"] == ["postgresql"], "the configuration server does not use it yet"


def test_the_compose_files_command_is_one_that_farpoint_has() -> None:
    from farpoint.up_command import up_command

    compose = yaml.safe_load((DEPLOY / "containers/compose.yaml").read_text("utf-8"))
    first, *arguments = compose["services"]["site"]["command"]
    assert first == "up"
    up_command.make_context("up", list(arguments), resilient_parsing=False)


def test_the_kubernetes_settings_are_good() -> None:
    text = manifests()["ConfigMap"]["data"]["process-server.toml"]
    values = tomllib.loads(text)
    flags = {key: value for key, value in values.items() if not isinstance(value, dict)}
    flags |= {
        f"{key}.{inner}": one
        for key, value in values.items()
        if isinstance(value, dict)
        for inner, one in value.items()
    }
    variables = {one["name"]: one["value"] for one in container()["env"]}
    loaded = load(ProcessServerSettings, program="process-server", flags=flags, environment=variables)
    assert loaded.settings.host == "process-server.example.org"
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert str(loaded.settings.state_directory) in mounts
    assert str(loaded.settings.store_credentials_file).rpartition("/")[0] in mounts
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"agents": loaded.settings.listen_address.port, "metrics": 9465}
    size = re.fullmatch(r"(\d+)Gi", pod_set()["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"])
    assert size
    assert int(size[1]) * 2**30 > loaded.settings.cache_bytes_max


def pod_set() -> dict[str, Any]:
    found: dict[str, Any] = manifests()["StatefulSet"]["spec"]
    return found


def container() -> dict[str, Any]:
    (found,) = pod_set()["template"]["spec"]["containers"]
    return dict(found)


def test_kubernetes_sets_no_variable_that_the_program_would_take_for_a_setting() -> None:
    """It sets FARPOINT_PROCESS_SERVER_PORT and the like for a service of that name unless it is told not to."""
    variable = manifests()["Service"]["metadata"]["name"].upper().replace("-", "_") + "_SERVICE_HOST"
    assert variable.startswith(environment_prefix("process-server"))
    assert "service_host" not in dict(known_keys(ProcessServerSettings))
    assert pod_set()["template"]["spec"]["enableServiceLinks"] is False


def test_the_pod_is_confined_and_its_parts_belong_together() -> None:
    spec = pod_set()["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert (
        f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['fsGroup']}"
        == stages()["process-server"]["USER"][0]
    )
    assert spec["terminationGracePeriodSeconds"] > ProcessServerSettings().stop_seconds_max + 10
    volumes = {volume["name"] for volume in spec["volumes"]} | {"state"}
    for one in [*spec["initContainers"], *spec["containers"]]:
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
    labels = pod_set()["template"]["metadata"]["labels"]
    for selector in (
        pod_set()["selector"]["matchLabels"],
        manifests()["Service"]["spec"]["selector"],
        manifests()["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector == labels
    assert pod_set()["replicas"] == 1
