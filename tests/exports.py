"""Every pruned network of the collection through torch.export and ONNX: python tests/exports.py [NAME ...].

Prints a line for each, and those at the end that the whole network passes and the pruned one does not.
"""

import contextlib
import io
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from architectures import ARCHITECTURES, make
from torch.utils._pytree import tree_map

import pyro_bmrs as bmrs
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call, output_tensors


def small_network(name, width=False):
    """Return a network without two fifths of its structures, inputs of four examples, and of seven."""
    net, x = make(name)
    structures = bmrs.find_structures(net, x, width=width)
    if not structures:
        return None, _batch(x, 4), _batch(x, 7)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    generator = torch.Generator().manual_seed(1)
    masks = {site: torch.rand(size, generator=generator) < 0.6 for site, size in model.sizes.items()}
    return bmrs.compact(model, bmrs.TruncatedLogNormalGuide(model), masks, x), _batch(x, 4), _batch(x, 7)


def exported(net, x):
    """Return the exported program of a network, the number of examples left open."""
    batch = torch.export.Dim("batch", min=2, max=512)

    def shape(tensor):
        return {0: batch} if tensor.dim() else None

    args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    shapes = {key: shape(each) for key, each in kwargs.items()} or tuple(shape(each) for each in args)
    return torch.export.export(net.eval(), args, kwargs, dynamic_shapes=shapes)


def in_onnxruntime(net, few, more, path):
    """Export a network with some inputs, run it in onnxruntime with others, and return the largest difference."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(exported(net, few), (), path, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = list(more.values()) if isinstance(more, dict) else list(more) if isinstance(more, tuple) else [more]
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, {name: each.numpy() for name, each in zip(names, given, strict=True)})
    with torch.no_grad():
        expected = output_tensors(call(net, more))
    return max(float((torch.from_numpy(a) - b).abs().max()) for a, b in zip(found, expected, strict=True))


def _batch(x, size):
    return tree_map(lambda each: torch.cat([each] * 4)[:size] if each.dim() else each, x)


def _export_error(net, few, more):
    program = exported(net, few)
    with torch.no_grad():
        return difference(call(program.module(), more), call(net, more))


def _tried(attempt):
    """Return a number, or why there is none."""
    try:
        return attempt()
    except Exception as error:  # whatever an exporter raises
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:80]}"


def main(names):
    """Try them, and return the names of those at fault."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    at_fault = []
    for name in names or ARCHITECTURES:
        small, few, more = small_network(name, width=True)
        if small is None:
            print(f"{name}: nothing to remove", flush=True)
            continue
        whole = _tried(lambda: _export_error(make(name)[0], few, more))  # noqa: B023  (called at once)
        found = _tried(lambda: _export_error(small, few, more))  # noqa: B023
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "small.onnx"
            onnx = _tried(lambda: in_onnxruntime(small, few, more, path))  # noqa: B023
            whole_onnx = onnx
            if not isinstance(onnx, float):
                whole_onnx = _tried(lambda: in_onnxruntime(make(name)[0], few, more, path))  # noqa: B023
        print(f"{name}: whole {_short(whole)}, pruned {_short(found)}, in onnxruntime {_short(onnx)}", flush=True)
        good = isinstance(found, float) and found < 1e-5, isinstance(onnx, float) and onnx < 1e-5
        if (isinstance(whole, float) and not good[0]) or (isinstance(whole_onnx, float) and not good[1]):
            at_fault.append(name)
    print("at fault:", ", ".join(at_fault) or "none")
    return at_fault


def _short(value):
    return f"{value:.0e}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
