"""What the chart renders, for every values file in ci/."""

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from cluster.cli import app
from cluster.config import Config
from cluster.recipe import load_recipe, load_reward_section
from reward_server.config import RewardSection
from tests.deploy.manifests import pods_of, the

ROOT = Path(__file__).resolve().parents[2]
Cases = dict[str, list[dict[str, Any]]]


def every_pod(cases: Cases) -> Iterator[tuple[str, dict[str, Any]]]:
    for case, manifests in cases.items():
        for pod in pods_of(manifests):
            yield f"{case}: {pod['metadata']['labels']['app.kubernetes.io/component']}", pod


def test_every_pod_is_confined(cases: Cases) -> None:
    pods = list(every_pod(cases))
    assert {name.partition(": ")[2] for name, _ in pods} == {
        "ray-head", "ray-worker", "submitter", "redis", "reward-server", "reward-head", "reward-worker", "test",
    }  # fmt: skip
    for name, pod in pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, name
            assert container["resources"]["limits"] == container["resources"]["requests"], name
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), name


def test_volumes_and_mounts_agree_and_what_is_written_to_is_mounted(cases: Cases) -> None:
    for name, pod in every_pod(cases):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        volumes |= {"data"} if name.endswith("redis") else set()  # of the StatefulSet's claim
        mounts = [mount for container in pod["spec"]["containers"] for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == volumes, name
        writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
        if name.endswith("redis"):
            assert writable == {"/data", "/run/redis"}, name
        elif "ray-job-submitter" in str(pod) or name.endswith("test"):
            assert writable == {"/tmp"}, name
        else:
            assert writable >= {"/tmp", "/dev/shm"}, name
            (memory,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "shared-memory"]
            assert memory["emptyDir"]["medium"] == "Memory", name


def test_secrets_come_by_reference_alone(cases: Cases) -> None:
    for manifests in cases.values():
        assert not [one for one in manifests if one["kind"] == "Secret"]
    for name, pod in every_pod(cases):
        for variable in (each for container in pod["spec"]["containers"] for each in container.get("env", [])):
            assert ("value" in variable) != ("valueFrom" in variable), name
            if re.search("PASSWORD|TOKEN", variable["name"]):
                assert variable["valueFrom"].keys() == {"secretKeyRef"}, name


def test_selectors_find_pods_and_their_ports(cases: Cases) -> None:
    for case, manifests in cases.items():
        pods = pods_of(manifests)
        for one in manifests:
            selector, ports = _selector_and_ports(one)
            if selector is None:
                continue
            chosen = [pod for pod in pods if _matches(selector, pod["metadata"]["labels"])]
            assert chosen, f"{case}: {one['kind']} {one['metadata']['name']} selects nothing"
            for pod in chosen:
                names = {port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", [])}
                assert ports <= names, f"{case}: {one['kind']} {one['metadata']['name']}"


def _selector_and_ports(one: Mapping[str, Any]) -> tuple[dict[str, Any] | None, set[str]]:
    spec = one.get("spec", {})
    match one["kind"]:
        case "Service":
            return {"matchLabels": spec["selector"]}, {port["targetPort"] for port in spec["ports"]}
        case "PodMonitor":
            return spec["selector"], {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
        case "PodDisruptionBudget" | "Deployment" | "StatefulSet":
            return spec["selector"], set()
        case "NetworkPolicy":
            return spec["podSelector"], set()
        case _:
            return None, set()


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items() and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", [])
    )


def test_kuberays_own_labels_stay_its_own(cases: Cases) -> None:
    """Its service of the head selects by them: a pod with other values is not found by its workers."""
    for name, pod in every_pod(cases):
        if "ray-" in name or "reward-head" in name or "reward-worker" in name:
            assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & pod["metadata"]["labels"].keys(), (
                name
            )


def test_the_command_trains_the_recipe_on_the_volume(cases: Cases) -> None:
    for case, manifests in cases.items():
        if case == "raycluster":
            continue
        job = the(manifests, "RayJob")["spec"]
        head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        words = shlex.split(job["entrypoint"])
        assert words[:4] == ["python", "-m", "cluster", "train"], case
        train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
        asked = train.make_context("train", words[4:]).params
        run_dir = asked["run_dir"]
        mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "data")
        assert run_dir.is_relative_to(mount["mountPath"]), case
        claim = next(volume for volume in head["volumes"] if volume["name"] == "data")["persistentVolumeClaim"][
            "claimName"
        ]
        claims = [one["metadata"]["name"] for one in manifests if one["kind"] == "PersistentVolumeClaim"] or ["shared"]
        assert [claim] == claims, case
        if case != "everything":  # its recipe is the user's
            config = load_recipe(recipe_of(asked["recipe"], manifests), asked["overrides"])
            check_config(case, config, manifests)


def recipe_of(path: Path, manifests: list[dict[str, Any]]) -> Path:
    """The recipe that a path in a container is, as a file here."""
    if path.is_relative_to("/opt/attune"):
        return ROOT / path.relative_to("/opt/attune")
    assert path == Path("/etc/attune/recipe.yaml")
    here = Path("recipe.yaml").absolute()
    here.write_text(the(manifests, "ConfigMap", "-recipe")["data"]["recipe.yaml"], encoding="utf-8")
    return here


def check_config(case: str, config: Config, manifests: list[dict[str, Any]]) -> None:
    head = the(manifests, "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    env = {variable["name"] for variable in head["env"]}
    assert config.stream.url is not None, case
    assert config.stream.password_env in env, case
    assert (config.cluster.weights_dir or "").startswith("/data/"), case
    if config.stream.url.startswith("redis://"):
        service = re.sub(r"redis://(.*):6379/0", r"\1", config.stream.url)
        assert the(manifests, "Service", "-redis")["metadata"]["name"] == service, case
    if case.startswith("reward-") or case == "inline-recipe":
        assert config.reward.token_env in env, case
        url = config.reward.worker.url
        if case == "reward-rayservice":
            assert url == f"http://{the(manifests, 'RayService')['metadata']['name']}-serve-svc:8000"
        else:
            assert url == f"http://{the(manifests, 'Deployment')['metadata']['name']}:8077"
    else:
        assert config.reward.worker.url is None, case


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_stop_leaves_time_for_the_last_commit_at_every_level(cases: Cases) -> None:
    for case, manifests in cases.items():
        for pod in pods_of(manifests):
            container = pod["spec"]["containers"][0]
            if container["name"] not in ("ray-head", "ray-worker") or "lifecycle" not in container:
                continue
            hook = container["lifecycle"]["preStop"]["exec"]["command"]
            assert hook[:4] == ["python", "-m", "cluster.drain", "--seconds"], case
            assert ("--wait" in hook) == (container["name"] == "ray-worker"), case
            job_waits = next(int(one["value"]) for one in container["env"] if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
            grace = 300 if case == "everything" else 60
            # Ray kills the driver after its wait; the driver needs 10 s beyond cluster.stop_s to take its parts down.
            assert grace + 10 <= job_waits < int(hook[4]) < pod["spec"]["terminationGracePeriodSeconds"], case


def test_ray_clusters(cases: Cases) -> None:
    lock = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    for case, manifests in cases.items():
        for one in manifests:
            spec = {
                "RayJob": lambda one: one["spec"]["rayClusterSpec"],
                "RayCluster": lambda one: one["spec"],
                "RayService": lambda one: one["spec"]["rayClusterConfig"],
            }.get(one["kind"], lambda _: None)(one)
            if spec is None:
                continue
            assert f"ray=={spec['rayVersion']}\n" in lock, case
            assert spec["authOptions"]["mode"] == "token", case
            assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", case
            name = one["metadata"]["name"]
            assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name), case
            assert len(name) <= 47, case  # KubeRay's limit for RayJob and RayService
            assert "shutdownAfterJobFinishes" not in one["spec"] or "deletionStrategy" not in one["spec"], case
    gpu = the(cases["gpu"], "RayJob")["spec"]["rayClusterSpec"]
    for group, gpus in zip(gpu["workerGroupSpecs"], ("1", "2"), strict=True):
        pod = group["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == gpus
        assert pod["nodeSelector"]["nvidia.com/gpu.present"] == "true"
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        assert pod["runtimeClassName"] == "nvidia"
    head = gpu["headGroupSpec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in str(head)
    assert the(cases["raycluster"], "RayCluster")["spec"]["authOptions"]["secretName"] == "ray-token"


def test_network_policy_lets_in_and_out_what_is_needed(cases: Cases) -> None:
    for case, manifests in cases.items():
        policy = the(manifests, "NetworkPolicy")["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"], case
        assert all(_matches(policy["podSelector"], pod["metadata"]["labels"]) for pod in pods_of(manifests)), case
        dns = next(rule for rule in policy["egress"] if rule.get("ports", [{}])[0].get("port") == 53)
        asked = {(port["port"], port["protocol"]) for port in dns["ports"]}
        # CoreDNS; OpenShift's, whose pods listen elsewhere than its service.
        assert asked == {(port, protocol) for port in (53, 5353) for protocol in ("UDP", "TCP")}, case
        assert all(rule.get("from") for rule in policy["ingress"]), case
        assert all(rule.get("to") for rule in policy["egress"]), case


def test_disruption_budgets_count_pods(cases: Cases) -> None:
    for case, manifests in cases.items():
        budgets = [one["spec"] for one in manifests if one["kind"] == "PodDisruptionBudget"]
        assert budgets, case
        assert all(type(budget["minAvailable"]) is int for budget in budgets), case


def test_rayservice_runs_the_application(cases: Cases) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(
        yaml.safe_load(the(cases["reward-rayservice"], "RayService")["spec"]["serveConfigV2"])
    )
    (application,) = config.applications
    assert application.import_path == "reward_server.ray_serve:application"
    section = RewardSection.model_validate(application.args)
    assert section.sources.keys() == {"attention"}
    assert section.drain_s == 30


def test_reward_servers_read_the_models_on_the_volume_and_write_elsewhere(cases: Cases) -> None:
    claims = 0
    for name, pod in every_pod(cases):
        container = pod["spec"]["containers"][0]
        training = any(one["name"] == "ATTUNE_REDIS_PASSWORD" for one in container.get("env", []))
        data = [volume for volume in pod["spec"].get("volumes", []) if volume["name"] == "data"]
        if training or not data:
            continue
        claims += 1
        assert "persistentVolumeClaim" in data[0], name
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/data"]
        assert mount["readOnly"], name
        assert {"name": "HF_HOME", "value": "/tmp/huggingface"} in container["env"], name
        assert pod["spec"]["terminationGracePeriodSeconds"] > 30, name  # rewardServer.drainSeconds
    assert claims >= 4


def test_losing_the_submitter_does_not_end_the_run(cases: Cases) -> None:
    job = the(cases["default"], "RayJob")["spec"]
    assert job["submitterConfig"]["backoffLimit"] == 20  # KubeRay gives a run up after it
    notes = job["submitterPodTemplate"]["metadata"]["annotations"]
    assert notes["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_reward_server_takes_its_recipe(cases: Cases) -> None:
    for case in ("reward-deployment", "inline-recipe", "everything"):
        pod = the(cases[case], "Deployment")["spec"]["template"]["spec"]
        container = pod["containers"][0]
        words = [*container["command"], *container["args"]]
        assert words[:2] == ["attune", "reward-server"]
        serve = typer.main.get_command(app).commands["reward-server"]  # type: ignore[attr-defined]
        asked = serve.make_context("reward-server", words[2:]).params
        assert (asked["host"], asked["port"]) == ("0.0.0.0", 8077)  # noqa: S104
        if case != "everything":
            section = load_reward_section(recipe_of(asked["recipe"], cases[case]), asked["overrides"])
            assert "attention" in section.sources
            assert pod["terminationGracePeriodSeconds"] > section.drain_s


def test_each_dashboard_becomes_a_configmap_of_the_packaged_chart(checker: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / "deploy" / "helm" / "attune"
    shutil.copytree(checker.CHART, copy, symlinks=True)
    assert (copy / "dashboards").is_symlink()
    grafana = tmp_path / "deploy" / "grafana"
    grafana.mkdir()
    written = {"run.json": '{\n  "title": "Run {{source}}"\n}', "reward_server.json": '{"title": "Reward server"}'}
    for name, text in written.items():
        (grafana / name).write_text(text + "\n", encoding="utf-8")
    checker.run("helm", "package", str(copy), "--destination", str(tmp_path))
    (packaged,) = tmp_path.glob("*.tgz")
    grafana.rename(tmp_path / "away")
    rendered = checker.render(packaged, options=("--set", "monitoring.dashboards.enabled=true"))
    maps = [one for one in checker.manifests(rendered) if one["metadata"]["labels"].get("grafana_dashboard") == "1"]
    assert {name: text.strip() for one in maps for name, text in one["data"].items()} == written
    assert {one["metadata"]["name"] for one in maps} == {
        "run-attune-dashboard-run",
        "run-attune-dashboard-reward-server",
    }


def test_dashboards_of_the_repository_are_in_the_chart(cases: Cases) -> None:
    files = {path.name for path in (ROOT / "deploy" / "grafana").glob("*.json")}
    maps = [one for one in cases["everything"] if one["metadata"]["labels"].get("grafana_dashboard") == "1"]
    assert {name for one in maps for name in one["data"]} == files
