"""Settings: from the environment or a file, refused when they are dangerous or wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from chunkplan.service.cli.settings_file import as_toml
from chunkplan.service.serve import main
from chunkplan.service.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _only_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_defaults_are_for_one_person_on_one_machine(tmp_path):
    settings = Settings()
    assert settings.database_url == f"sqlite:///{tmp_path}/var/chunkplan.db"
    assert settings.models_dir == tmp_path / "var" / "models"
    assert (settings.host, settings.port) == ("127.0.0.1", 8321)


def test_the_environment_wins_over_the_file(monkeypatch, tmp_path):
    file = tmp_path / "chunkplan.toml"
    file.write_text('port = 9000\nmodel_roots = ["/models"]\n')
    monkeypatch.setenv("CHUNKPLAN_SETTINGS_FILE", str(file))
    assert Settings().port == 9000
    monkeypatch.setenv("CHUNKPLAN_PORT", "9001")
    settings = Settings()
    assert settings.port == 9001
    assert [str(root) for root in settings.model_roots] == ["/models"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "CHUNKPLAN_SETTINGS_FILE: cannot read "),
        ("port =", "CHUNKPLAN_SETTINGS_FILE: cannot read "),
        ("prot = 9000", "CHUNKPLAN_PROT: "),
        ("[quota]\nmax_jobs = 1", "CHUNKPLAN_QUOTA.MAX_JOBS: "),
    ],
)
def test_a_settings_file_that_is_wrong_is_refused(monkeypatch, tmp_path, capsys, content, message):
    file = tmp_path / "chunkplan.toml"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("CHUNKPLAN_SETTINGS_FILE", str(file))
    assert main() == 2
    assert capsys.readouterr().err.startswith(message)


def test_what_is_printed_is_what_is_in_force(monkeypatch, tmp_path):
    monkeypatch.setenv("CHUNKPLAN_PROJECT_QUOTAS", '{"vision.team": {"max_streams": 3}}')
    monkeypatch.setenv("CHUNKPLAN_ALLOWED_HOSTS", '["gpu-box"]')
    monkeypatch.setenv("CHUNKPLAN_DEVICES", '[{"name": "cuda:1", "max_jobs": 2}, {"name": "cpu", "memory_bytes": 9}]')
    monkeypatch.setenv("CHUNKPLAN_DATA_DIR", str(tmp_path / 'wei"rd é'))
    settings = Settings(port=9000)
    for name in ("PROJECT_QUOTAS", "ALLOWED_HOSTS", "DEVICES", "DATA_DIR"):
        monkeypatch.delenv(f"CHUNKPLAN_{name}")
    file = tmp_path / "printed.toml"
    file.write_text(as_toml(settings))
    monkeypatch.setenv("CHUNKPLAN_SETTINGS_FILE", str(file))
    assert Settings() == settings
    secret = as_toml(Settings(database_url="postgresql://me:hush@db/chunkplan"))
    assert 'database_url = "postgresql://me:***@db/chunkplan"' in secret
    assert "hush" not in secret


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_an_open_host_needs_keys_unless_the_network_is_closed(host):
    assert Settings(host=host).requires_keys
    assert not Settings(host=host, trusted_network=True).requires_keys


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host):
    assert not Settings(host=host).requires_keys


def test_a_project_has_the_common_quota_but_for_what_is_its_own(monkeypatch):
    monkeypatch.setenv("CHUNKPLAN_QUOTA__MAX_OPEN_JOBS", "7")
    monkeypatch.setenv("CHUNKPLAN_PROJECT_QUOTAS", '{"alpha": {"max_streams": 3}}')
    settings = Settings()
    alpha, other = settings.quota_of("alpha"), settings.quota_of("other")
    assert (alpha.max_open_jobs, alpha.max_streams) == (7, 3)
    assert (other.max_open_jobs, other.max_streams) == (7, 200)


@pytest.mark.parametrize(("name", "value"), [("DATABASE_URL", "mysql://nowhere"), ("DEVICES", '[{"name": "cuda:99"}]')])
def test_a_server_with_a_wrong_setting_says_which_and_exits_2(monkeypatch, name, value):
    monkeypatch.setenv(f"CHUNKPLAN_{name}", value)
    answer = subprocess.run([sys.executable, "-m", "chunkplan.service.serve"], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"CHUNKPLAN_{name}: ")
    assert "Traceback" not in answer.stderr
