"""`torch.onnx.export(model, ..., dynamo=False)`: the exporter of TorchScript graphs is pointed to the other one."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.onnx._constants import ONNX_MIN_OPSET
from torch.onnx._internal.torchscript_exporter import utils


def _refuse(graph: Any, *args: Any) -> NoReturn:
    raise RuntimeError("quantized layers are exported by torch.onnx.export(model, args, path, dynamo=True)")


for _name in torch._C._dispatch_get_all_op_names():
    if _name.startswith("qkernels::"):
        utils.register_custom_op_symbolic(_name, _refuse, ONNX_MIN_OPSET)
