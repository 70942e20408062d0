"""The files in deploy/: valid by schema, and with flags, routes and paths that exist."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import data
import monitor
import server
import train

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def validate(document: dict) -> None:
    """By the schemas of the newest Kubernetes that is known, strictly: unknown fields are errors."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def in_deployment(pod: dict) -> dict:
    labels = {"app": "x"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": spec}


def serves(arguments: list[str]) -> None:
    """Raises SystemExit if the arguments of a container are not those of the server."""
    assert arguments[0] == "server.py"
    parser = data.Parser("server.py", "", "")
    data.add_flags(parser, server.SERVER_FLAGS)
    parser.parse_args(arguments[1:])


def probes(container: dict) -> set[str]:
    return {probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}


def test_kubernetes_accepts_the_manifest():
    for document in documents("kubernetes.yaml"):
        validate(document)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(in_deployment({"containers": [{"name": "x", "image": "x", "livenesProbe": {}}]}))
    (deployment,) = (document for document in documents("kubernetes.yaml") if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    serves(container["args"])
    assert probes(container) <= set(server.PROBES)
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > server.DRAIN_SECONDS + 3


def test_cloud_run_files_hold_valid_pods():
    """Their own fields besides the pod's are named here."""
    (service,) = documents("cloudrun-service.yaml")
    pod = service["spec"]["template"]["spec"]
    assert (pod.pop("containerConcurrency"), pod.pop("timeoutSeconds")) == (40, 130)
    (container,) = pod["containers"]
    serves(container["args"])
    assert probes(container) <= set(server.PROBES) and not any(path.endswith("z") for path in probes(container))
    validate(in_deployment(pod | {"containers": [container | {"name": "server"}]}))
    (job,) = documents("cloudrun-job.yaml")
    pod = job["spec"]["template"]["spec"]["template"]["spec"]
    assert pod.pop("timeoutSeconds") == 86400 and pod.pop("maxRetries") == 3
    (container,) = pod["containers"]
    validate(in_deployment(pod | {"containers": [container | {"name": "train"}]}))
    for words in re.findall(r"python train\.py ([^;]*);", " ".join(container["args"])):
        train.parse_arguments(words.split())


def test_compose_services_run_the_server_and_scrape_it():
    (compose,) = documents("compose.yaml")
    serves(compose["services"]["server"]["command"])
    assert (DEPLOY / compose["services"]["server"]["build"]["context"] / "Dockerfile").exists()
    assert (DEPLOY / compose["configs"]["alerts"]["file"]).exists()
    scraping = yaml.safe_load(compose["configs"]["prometheus"]["content"])
    targets = [config["static_configs"][0]["targets"] for config in scraping["scrape_configs"]]
    assert targets == [["server:8000"], ["node-exporter:9100"]]


def test_compose_watches_what_the_server_saves():
    """The monitor reads the folder that the server writes, and the exporter the folder that the monitor writes."""
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    command = services["monitor"]["command"]
    args = monitor.parse_arguments(command[1:])
    assert command[0] == "monitor.py" and args.command == "watch" and args.every == 3600
    saved = services["server"]["command"][services["server"]["command"].index("--save") + 1]
    assert args.subject == saved and f"served:{saved}:ro" in services["monitor"]["volumes"]
    assert f"--collector.textfile.directory={args.out}" in services["node-exporter"]["command"]
    assert {f"{mount.split(':')[0]}" for name in services for mount in services[name].get("volumes", [])} == {
        *compose["volumes"]
    }
    once = re.search(r"run --rm monitor monitor\.py (.*?) +# once", (DEPLOY / "compose.yaml").read_text())[1]
    assert str(monitor.parse_arguments(once.split()).out) == args.reference
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert all(f" {folder}" in dockerfile for folder in ("/watch", saved))


def test_systemd_starts_the_server():
    text = (DEPLOY / "papilio.service").read_text()
    (words,) = re.findall(r"^ExecStart=\S+/python /opt/papilio/(.*)$", text, re.MULTILINE)
    serves(words.split())
    assert float(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1]) > server.DRAIN_SECONDS + 3


def test_the_image_has_what_the_program_needs():
    """What the Dockerfile copies exists, is not ignored, and is all that the modules read."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for words in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE):
        for name in words.split()[:-1]:
            assert list(ROOT.glob(name)) and f"!{name}" in ignored, name
    assert "builtin" in dockerfile and server.PAGE.is_relative_to(ROOT / "web")
    (command,) = re.findall(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    serves(yaml.safe_load(command))


def test_the_version_is_one():
    assert f'version = "{data.VERSION}"' in (ROOT / "pyproject.toml").read_text()
