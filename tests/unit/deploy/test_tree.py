"""What `deploy/` holds renders, has the right form and breaks no rule; what excludes each other is refused by name."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from scripts import alerts, dashboards
from scripts.manifests import compose, render, schemas, settings
from scripts.manifests.check import findings, judge_file, source_errors, unpinned
from smeltkit.errors import BadConfig
from smeltkit.telemetry import names

ROOT, TREE = render.ROOT, render.TREE
COMPOSE = ROOT / "deploy" / "compose" / "compose.yaml"


@pytest.mark.parametrize("overlay", [name for name in render.overlays() if name != "production"])
def test_an_overlay_has_the_right_form_and_breaks_no_policy(overlay: str) -> None:
    """For the three versions of Kubernetes that are supported; production is judged beside its seeded mistakes."""
    assert len(schemas.VERSIONS) == 3
    assert list(findings(render.render_overlay(overlay))) == []


def test_each_component_is_rendered_by_an_overlay_or_a_combination() -> None:
    catalogue = render.catalogue()
    used = {part for parts in catalogue.combinations.values() for part in catalogue.complete(parts)}
    known = {path.parent.name for path in TREE.glob("components/*/kustomization.yaml")}
    assert known - used == set()
    for name, parts in catalogue.combinations.items():
        catalogue.check(name, catalogue.complete(parts))


def test_the_largest_combination_breaks_no_policy() -> None:
    parts = render.catalogue().combinations["dynamic-resources"]
    assert list(findings(render.render_components("dynamic-resources", parts))) == []


@pytest.mark.parametrize(
    ("components", "words"),
    [
        (["keda", "hpa"], "keda and hpa exclude each other"),
        (["s3", "external-s3"], "s3 and external-s3 exclude each other"),
        (["gpu-pool", "mig"], "gpu-pool and mig exclude each other"),
        (["gpu-dra", "gpu-pool"], "exclude each other"),
        (["kedda"], "'kedda' does not exist; known: argo-rollouts"),
    ],
)
def test_components_that_exclude_each_other_are_refused_before_they_are_rendered(
    components: list[str], words: str
) -> None:
    with pytest.raises(BadConfig, match=words):
        render.render_components("mixed", components)


def test_without_kubectl_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadConfig, match=r"kubectl 1.27 or newer"):
        render.render_overlay("laptop")


def test_a_component_without_what_it_needs_is_refused() -> None:
    with pytest.raises(BadConfig, match="tls needs gateway-api"):
        render.catalogue().check("overlay x", ["tls"])


def test_a_component_before_what_it_changes_is_refused() -> None:
    """A patch of what is not there yet would change nothing, and nobody would be told: an edge in the clear."""
    with pytest.raises(BadConfig, match="tls changes what gateway-api brings; list it after gateway-api"):
        render.catalogue().check("overlay x", ["tls", "gateway-api"])


def test_the_patch_that_the_docs_show_opens_the_way_to_the_clusters_api(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(patches:\n.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    shutil.copytree(TREE / "components" / "argo-workflows", tmp_path / "component")
    (tmp_path / "kustomization.yaml").write_text(f"components: [component]\n{text}")
    [policy] = [one for one in render.kustomized(tmp_path) if one["kind"] == "NetworkPolicy"]
    assert policy["spec"]["egress"][0]["to"] == [{"ipBlock": {"cidr": "198.51.100.7/32"}}]


def test_a_kind_without_a_schema_is_refused_and_not_passed_over() -> None:
    document = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}}
    with pytest.raises(BadConfig, match=r"no schema for example.com/v1 Thing"):
        schemas.judge(document)


def test_a_version_that_no_supported_cluster_serves_is_refused() -> None:
    document = {"apiVersion": "policy/v1beta1", "kind": "PodDisruptionBudget", "metadata": {"name": "x"}}
    with pytest.raises(BadConfig, match=r"has no policy/v1beta1 PodDisruptionBudget"):
        schemas.judge(document)


def test_gitops_resources_have_the_right_form_and_name_overlays_that_exist() -> None:
    files = sorted(TREE.glob("gitops/*/*.yaml"))
    assert len(files) == 2
    assert [line for path in files for line in judge_file(path)] == []
    [application] = render.parse(files[0].read_text())
    values = application["spec"]["generators"][0]["clusters"]["selector"]["matchExpressions"][0]["values"]
    assert set(values) <= set(render.overlays())


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("argo-cd/application-set.yaml", "k8s/overlays/", "k8s/overlay/", "overlay/staging is no overlay"),
        ("argo-cd/application-set.yaml", "name: inference,", "name: inferense,", "inferense is not in the base"),
        ("flux/kustomization.yaml", "overlays/production", "overlays/prodution", "prodution is no overlay"),
        ("flux/kustomization.yaml", "kind: GitRepository, name: smelt", "kind: GitRepository, name: smlt", "sourceRef"),
    ],
)
def test_a_gitops_resource_that_names_what_is_not_there_is_found(file: str, old: str, new: str, words: str) -> None:
    text = (TREE / "gitops" / file).read_text()
    assert old in text
    spoilt = list(render.parse(text.replace(old, new)))
    lines = [line for document in spoilt for line in source_errors(document, spoilt)]
    assert any(words in line for line in lines), lines


def test_an_image_that_was_never_built_is_named() -> None:
    """Zeros are no digest: a release is refused as long as they stand there."""
    assert "registry.example.com/smelt/gateway" in unpinned(render.render_overlay("production"))


def test_the_compose_file_is_in_order() -> None:
    assert list(compose.compose_errors(COMPOSE)) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("SMELT_INFERENCE_THREADS", "SMELT_INFERENCE_THREAD", "did you mean SMELT_INFERENCE_THREADS"),
        ("127.0.0.1:8080:8080", "8080:8080", "bind 127.0.0.1"),
        ("networks: [judge]", "networks: [judge, internet]", "internal networks only"),
        ("networks: [judge]", "networks: [platform]", "near its callers only, not bucket"),
        ("nats:2.15.1", "nats:latest", "tag other than latest"),
        ("S3_ACCESS_KEY: trainer", "S3_ACCESS_KEY: smelt", "meets the object store as smelt; its key is trainer"),
        ("stop_grace_period: 200s", "stop_grace_period: 20s", "a drain may last"),
        ("mem_limit: 8g", "mem_limits: 8g", "'mem_limits' was unexpected"),
        ("read_only: true", "read_only: false", "True was expected"),
        ("./nats.conf", "./nat.conf", "does not exist"),
    ],
)
def test_a_mistake_in_the_compose_file_is_found(old: str, new: str, words: str) -> None:
    text = COMPOSE.read_text()
    assert old in text
    errors = list(compose.errors_of(yaml.safe_load(text.replace(old, new)), COMPOSE.parent))
    assert any(words in error for error in errors), errors


def test_rules_and_dashboard_are_those_of_the_registry() -> None:
    """Generated; `python -m scripts.alerts` and `python -m scripts.dashboards` bring them up to date."""
    assert all(path.read_text() == text for path, text in alerts.files().items())
    assert dashboards.PATH.read_text() == dashboards.render()
    titles = {panel["title"] for panel in dashboards.dashboard()["panels"]}
    assert set(names.metrics()) - titles == dashboards.NOT_SENT


def test_every_metric_of_the_registry_is_recorded_somewhere() -> None:
    """A panel that stays empty for ever would look like health."""
    code = "".join(
        path.read_text()
        for package in ("smeltkit", "services", "gateway")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "names.py"
    )
    declared = {key for key, value in vars(names).items() if isinstance(value, names.Metric)}
    assert {key for key in declared if f"names.{key}" not in code} == set()


def test_every_alert_has_a_page_and_cases_of_fire_and_of_silence() -> None:
    cases = yaml.safe_load((ROOT / "deploy" / "alerts.test.yaml").read_text())["tests"]
    asked = {
        (case["alertname"], bool(case["exp_alerts"])) for test in cases for case in test.get("alert_rule_test", ())
    }
    for alert in alerts.ALERTS:
        page = ROOT / "docs" / "runbooks" / alert.runbook
        assert page.is_file() and f"Smelt{alert.name}" in page.read_text(), alert.runbook
        assert {(f"Smelt{alert.name}", True), (f"Smelt{alert.name}", False)} <= asked, alert.name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")
def test_alerts_fire_and_stay_silent_as_their_cases_say() -> None:
    """By Prometheus's own tool."""
    cases = ROOT / "deploy" / "alerts.test.yaml"
    done = subprocess.run(["promtool", "test", "rules", cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_names_every_component_overlay_and_secret() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    named = [path.parent.name for path in TREE.glob("components/*/kustomization.yaml")] + render.overlays()
    assert [
        name for name in (*named, *settings.SECRETS) if f"`{name}`" not in page and f"generic {name} " not in page
    ] == []
    keys = {key for name in ("rpc", "s3", "nats-passwords") for key in settings.SECRETS[name]}
    assert [key for key in sorted(keys) if key not in page] == []
