"""Alert rules, scraping and the dashboard count on metrics that exist, and do what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy.needed_tools import DEPLOY, ROOT, need_tool, run

MONITORING = DEPLOY / "monitoring"
SUFFIXES = ("_bucket", "_sum", "_count")


def listed_metrics() -> set[str]:
    document = (ROOT / "docs/metrics.md").read_text("utf-8")
    return set(re.findall(r"^\|\s*`(farpoint_[a-z0-9_]+)`", document, re.MULTILINE))


def unlisted(text: str) -> set[str]:
    """Names of metrics in a text that docs/metrics.md does not list."""
    named = set(re.findall(r"\bfarpoint_[a-z0-9_]+", text))
    listed = listed_metrics()
    return {
        name for name in named if name not in listed and not any(name.removesuffix(end) in listed for end in SUFFIXES)
    }


def rules() -> list[dict[str, object]]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_everything_in_deploy_names_metrics_that_the_document_lists() -> None:
    texts = {path: path.read_text("utf-8") for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert sum("farpoint_agent_" in text for text in texts.values()) >= 3
    wrong = {str(path): names for path, text in texts.items() if (names := unlisted(text))}
    assert not wrong


def test_a_metric_that_does_not_exist_is_noticed() -> None:
    assert unlisted("rate(farpoint_agent_disk_sent_bytes_total[5m]) + farpoint_unheard_of_total") == {
        "farpoint_unheard_of_total"
    }


def test_promtool_finds_the_rules_and_the_scraping_sound() -> None:
    need_tool("promtool", "prometheus")
    assert "SUCCESS" in run("promtool", "check", "rules", MONITORING / "alerts.yml")
    assert "SUCCESS" in run("promtool", "check", "config", MONITORING / "prometheus.yml")


def test_every_alert_fires_when_it_should_and_is_silent_when_it_should() -> None:
    need_tool("promtool", "prometheus")
    assert "SUCCESS" in run("promtool", "test", "rules", "alerts_test.yml", cwd=MONITORING)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_the_rule_tests_notice_a_rule_that_never_fires(tmp_path: Path, rule: dict[str, object]) -> None:
    need_tool("promtool", "prometheus")
    silenced = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))
    for group in silenced["groups"]:
        for one in group["rules"]:
            if one["alert"] == rule["alert"]:
                one["expr"] = f"({one['expr']}) unless on () vector(1)"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(silenced))
    (tmp_path / "alerts_test.yml").write_bytes((MONITORING / "alerts_test.yml").read_bytes())
    with pytest.raises(AssertionError, match=str(rule["alert"])):
        run("promtool", "test", "rules", "alerts_test.yml", cwd=tmp_path)


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"}), rule
        assert set(rule["annotations"]) == {"summary", "action"}, rule  # type: ignore[call-overload]


def test_the_dashboard_shows_what_is_unknown_as_unknown() -> None:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text("utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["targets"], panel["title"]
        if panel["type"] == "stat":
            assert panel["fieldConfig"]["defaults"]["noValue"] == "unknown"


def test_the_dashboards_expressions_are_sound(tmp_path: Path) -> None:
    need_tool("promtool", "prometheus")
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text("utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    recorded = [{"record": f"dashboard:panel:{number}", "expr": expr} for number, expr in enumerate(expressions)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"{len(expressions)} rules found" in run("promtool", "check", "rules", tmp_path / "rules.yml")
