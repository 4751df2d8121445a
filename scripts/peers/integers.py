"""Time `largebatch bench quantize` beside onnxruntime: in floats, and in integers that it has made itself.

    uv sync --group bench
    python scripts/peers/integers.py [key=value ...]

Takes what `largebatch bench quantize` takes.
"""

import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from largebatch.bench import int8
from largebatch.bench.int8 import Pass
from largebatch.cli.main import main
from largebatch.quantization.network import IMAGES

PER_PASS = 32  # images of a pass of onnxruntime's calibration


def onnxruntime_sides(model: nn.Module, calibration: Tensor) -> dict[str, Pass]:
    """Return onnxruntime in floats, and in integers that it has made itself: static, by channel, its defaults else."""

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(torch.split(calibration, PER_PASS))

        def get_next(self) -> dict | None:
            batch = next(self.left, None)
            return None if batch is None else {IMAGES: batch.contiguous().numpy()}

    def session(path: Path) -> Pass:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: made.run(None, {IMAGES: images.contiguous().numpy()})

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # the exporter's, about its own workings
        floats, ready, whole = (Path(directory) / f"{name}.onnx" for name in ("floats", "ready", "integers"))
        batch = ({0: torch.export.Dim("batch")},)
        given = (calibration[:2],)
        torch.onnx.export(
            model, given, floats, verbose=False, external_data=False, input_names=[IMAGES], dynamic_shapes=batch
        )
        quant_pre_process(floats, ready, skip_symbolic_shape=True)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, whole, Reader(), per_channel=True, **types)
        return {"onnxruntime_float32": session(floats), "onnxruntime_static": session(whole)}


if __name__ == "__main__":
    int8.PEERS.append(onnxruntime_sides)
    int8.NAMES |= {
        "onnxruntime_float32": "onnxruntime, float32",
        "onnxruntime_static": "onnxruntime, its own int8",
    }
    sys.argv[1:1] = ["bench", "quantize"]
    main()
