"""docs/internals/peft-patch.diff applies to PEFT, whose own code then does what our integration does now."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "docs" / "internals" / "peft-patch.diff"
CHECK = """
import sys, warnings
import qkernels as qk
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "qkernels.integrations"]
import peft, torch
from torch import nn

assert "qkernels.integrations.peft" not in sys.modules and peft.__file__.startswith(sys.argv[1])
warnings.simplefilter("ignore")
targets = {"target_modules": ["0", "2"]}
configs = [
    peft.LoraConfig(**targets), peft.LoraConfig(**targets, use_dora=True), peft.VeraConfig(**targets, r=4),
    peft.OFTConfig(**targets, oft_block_size=8, r=0), peft.BOFTConfig(**targets, boft_block_size=8),
    peft.MissConfig(**targets, r=4), peft.MissConfig(**targets, r=4, init_weights="bat"),
    peft.ShiraConfig(**targets, r=2),
]


def integers(model):
    layers = [module for module in model.modules() if isinstance(module, qk.QuantLinear)]
    return [tensor.clone() for layer in layers for tensor in layer.state_dict().values()]


for config in configs:
    for scheme, mode in (("w8a8", "frozen"), ("w4a8-g32", "frozen"), ("w8a8", "int8")):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        qk.quantize_(net, scheme, mode)
        x, y = torch.randn(64, 32), torch.randn(64, 32)
        base, model = net(x).detach(), peft.get_peft_model(net, config)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(5):
            losses.append(nn.functional.mse_loss(model(x), y))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        model.eval()
        before, separate = integers(model), model(x).detach()
        model.merge_adapter()
        error = (model(x) - separate).norm() / separate.norm()
        model.unmerge_adapter()
        assert losses[-1] < losses[0] and error < (0.05 if scheme == "w8a8" else 0.2), (config.peft_type, error)
        assert all(map(torch.equal, integers(model), before)), config.peft_type
        with model.disable_adapter():
            assert torch.equal(model(x), base), config.peft_type
        assert {status.quantization_backend for status in model.get_layer_status()} == {"qkernels"}
        merged = model.merge_and_unload()
        assert type(merged[0]) is qk.QuantLinear
print("passed")
"""


@pytest.mark.slow
@pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the patch is for PEFT 0.21.2")
@pytest.mark.skipif(not PATCH.is_file() or shutil.which("git") is None, reason="needs the source tree and git")
def test_the_patch_is_what_peft_lacks(tmp_path):
    package = tmp_path / "src" / "peft"
    shutil.copytree(Path(peft.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", PATCH], cwd=tmp_path, check=True)
    path = os.pathsep.join([str(package.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CHECK, str(package)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.strip().endswith("passed"), run.stderr[-2000:]
