"""What CI runs exists, and its check of commit subjects refuses what it should."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / ".ci"

if not (ROOT / ".github").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)


def test_commands_of_the_workflow_exist():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = set(re.findall(r"run: make ([\w-]+)", workflow))
    assert {"lint", "test-quick"} <= targets <= rules
    scripts = set(re.findall(r"run: (\.ci/\w+)", workflow))
    assert ".ci/run" in scripts and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.skipif(shutil.which("git") is None or shutil.which("awk") is None, reason="needs git and awk")
@pytest.mark.parametrize(
    ("subject", "complaint"),
    [
        ("area: what", None),
        ("area, other: " + "x" * 59, None),
        ("area: " + "x" * 67, "73 characters, at most 72"),
        ("what without an area", 'expected "area: what"'),
    ],
)
def test_subjects_of_commits(tmp_path, subject, complaint):
    (tmp_path / ".ci").mkdir()
    shutil.copy(CI / "check_subjects", tmp_path / ".ci")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for message in ("start: here", subject):
        commit = ["git", *identity, "commit", "-q", "--allow-empty", "-m", message]
        subprocess.run(commit, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / ".ci/check_subjects", "HEAD~1..HEAD"], capture_output=True, text=True)
    assert (done.returncode == 0) == (complaint is None), done.stdout + done.stderr
    assert complaint is None or complaint in done.stdout
