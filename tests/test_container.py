"""The container and the manifest of docs/serving.md, as far as that goes without a container engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from models import saved
from test_build import SOURCES
from test_http import running

from sparsebert.config import ServeConfig
from sparsebert.serving.guard import OPEN

ROOT = Path(__file__).resolve().parent.parent
STEPS = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
LAST = STEPS[max(i for i, (word, _) in enumerate(STEPS) if word == "FROM") :]
VARIABLES = {f"{ServeConfig.variables}{name.upper()}" for name in ServeConfig.model_fields}


def of(word: str) -> list[str]:
    return [given for each, given in LAST if each == word]


def test_the_image_is_built_of_all_that_the_wheel_is_built_of():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    assert set(SOURCES) <= set(kept) and "constraints.txt" in kept and all((ROOT / name).exists() for name in kept)
    assert next(given for word, given in STEPS if word == "COPY") == ". /src"
    assert "torch" not in json.dumps(STEPS).replace("without torch", "")


def test_the_image_runs_the_command_as_nobody_with_a_key_asked_for():
    assert json.loads(of("ENTRYPOINT")[0]) == ["sparsebert", "serve"] and json.loads(of("CMD")[0]) == ["/model"]
    assert int(of("USER")[0].partition(":")[0]) > 0
    given = dict(part.split("=", 1) for line in of("ENV") for part in shlex.split(line))
    assert {name for name in given if name.startswith("SPARSEBERT_SERVE")} <= VARIABLES
    assert given["SPARSEBERT_SERVE_HOST"] == "0.0.0.0" and "SPARSEBERT_SERVE_INSECURE" not in given


def test_the_health_check_tells_a_server_that_is_ready_from_one_that_is_not(tmp_path):
    (line,) = of("HEALTHCHECK")
    _, _, code = json.loads(line[line.index("[") :])

    def checked(port: int) -> int:
        env = os.environ | {"SPARSEBERT_SERVE_PORT": str(port)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
        return done.returncode

    # Without a place for the cache, as on a root file system that is read-only.
    with running(saved(tmp_path / "model"), env={"SPARSEBERT_CACHE": "/proc/none"}) as begun:
        assert checked(begun.port) == 0 and begun.ask("/predict", {"inputs": "a film"})[0] == 200
        port = begun.port
        assert begun.end() == 0
    assert checked(port) != 0
    told = [json.loads(line) for line in begun.lines]
    assert "is not kept in /proc/none" in told[0]["warning"]


def test_the_manifest_asks_for_what_the_server_has():
    (text,) = re.findall(r"```yaml\n(apiVersion.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    deployment, service = yaml.safe_load_all(text)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables.keys() <= VARIABLES | {"SPARSEBERT_API_KEY"}
    waits = sum(float(variables[f"SPARSEBERT_SERVE_{name}"]) for name in ("STOP_DELAY", "DRAIN_TIMEOUT"))
    assert pod["spec"]["terminationGracePeriodSeconds"] > waits
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    ports = {each["containerPort"] for each in container["ports"]}
    assert all(probe["path"] in OPEN and probe["port"] in ports for probe in probes)
    assert service["spec"]["ports"][0]["targetPort"] in ports
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts["model"] == json.loads(of("CMD")[0])[0]
    assert {each["name"] for each in pod["spec"]["volumes"]} == set(mounts)
    assert container["securityContext"]["readOnlyRootFilesystem"] and container["securityContext"]["runAsNonRoot"]
