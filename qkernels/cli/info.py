"""`qkernels info`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .common import one_line_errors


@one_line_errors
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, the CPU instruction set in use and why, and what is missing for a GPU."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, Text(value))  # Text: brackets are no markup
    Console().print(table)


def collect() -> dict[str, Any]:
    """The facts behind `qkernels info`; imports no optional package."""
    from ..diagnostics.environment import environment
    from ..kernels import isa
    from ..system.host import fast_bf16

    current = isa.current()
    return environment() | {
        "isa": current,
        "isa_reason": isa.reason(),
        "isas_supported": list(isa.supported()),
        "isas_compiled": list(isa.compiled()),
        "fast_bfloat16": fast_bf16(),
        "gpu": _gpu_backends(),
    }


def _gpu_backends() -> dict[str, dict[str, Any]]:
    """What stands between this installation and each GPU backend."""
    import torch

    from ..kernels import cuda_library, dispatch
    from ..system.host import package_version

    if torch.cuda.is_available():
        device, missing = torch.cuda.get_device_name(), None
    elif torch.version.cuda or torch.version.hip:
        device, missing = None, "torch finds no GPU; check the driver with nvidia-smi or rocminfo"
    else:
        device, missing = None, "this torch is built for the CPU; install a CUDA or ROCm build from pytorch.org"
    installed, kernels = dispatch.triton_installed(), cuda_library.library()
    choice = dispatch.select(dispatch.facts_of(torch.device("cuda" if device else "cpu")))
    return {
        "device": {"name": device, "next_step": missing},
        "triton": {
            "version": package_version("triton") if installed else None,
            "next_step": None if installed else "pip install 'qkernels[triton]'",
        },
        "cuda": {"loaded": kernels.loaded, "reason": kernels.reason, "next_step": kernels.remedy},
        "kernels": {
            "backend": choice.backend if device else None,
            "available": bool(device) and choice.backend != "reference",
            "reason": choice.reason if device else "without a GPU none are used",
        },
    }


def _cuda_row(loaded: bool, reason: str, next_step: str | None) -> str:
    return f"{'loaded' if loaded else 'not loaded'}: {reason}" + (f"; {next_step}" if next_step else "")


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    versions = facts["packages"]
    gpu = facts["gpu"]
    return [
        ("qkernels", facts["qkernels"]),
        ("python", facts["python"]),
        *((name, versions[name] or "not installed") for name in versions),
        ("CPU", f"{facts['cpu']}, {facts['threads']} threads"),
        ("instruction set", facts["isa_reason"]),
        ("... supported", ", ".join(facts["isas_supported"])),
        ("... in this build", ", ".join(facts["isas_compiled"])),
        ("fast bfloat16", "yes" if facts["fast_bfloat16"] else "no: float32 is the faster float dtype here"),
        ("GPU", gpu["device"]["name"] or f"none: {gpu['device']['next_step']}"),
        ("triton", gpu["triton"]["version"] or f"not installed: {gpu['triton']['next_step']}"),
        ("CUDA kernels", _cuda_row(**gpu["cuda"])),
        ("GPU kernels", ": ".join(filter(None, (gpu["kernels"]["backend"], gpu["kernels"]["reason"])))),
    ]
