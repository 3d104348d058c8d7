"""Every op once on small and awkward shapes, for compute-sanitizer: `python -m bench.small --device cuda`.

Each backend's result is compared with the reference's on the same device.
"""

import argparse
import itertools

from bench import cases
from neuroflow_kernels import BackendUnavailable, unavailable, use_backend
from neuroflow_kernels.dispatch import BACKENDS

# By how many numbers an op's shapes have: one that 16-byte accesses fit, and one that nothing fits.
SHAPES = {3: ((2, 9, 72), (1, 5, 7)), 4: ((9, 70, 2, 64), (4, 5, 1, 24)), 5: ((2, 9, 70, 2, 64), (3, 4, 5, 1, 24))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    backends = [backend for backend in BACKENDS[1:] if unavailable(backend, device) is None]
    if not backends:
        raise SystemExit(f"{device}: no backend but the reference serves it (python -m neuroflow_kernels.env says why)")
    for op, backend in itertools.product(cases.OPS, backends):
        for shape, dtype in itertools.product(SHAPES[len(op.shapes[0])], op.dtypes):
            inputs = cases.OpCase(op, shape, dtype).build(device)
            with use_backend("reference"):
                expected = op.call(*cases.copied(inputs))
            try:
                with use_backend(backend):
                    cases.check(op, op.call(*cases.copied(inputs)), expected)
            except BackendUnavailable as error:
                print(f"{op.name}, {backend}: not run, {error}")
                break
            print(f"{op.name}, {backend}, {'x'.join(map(str, shape))} {cases.name_of(dtype)}: as the reference")


if __name__ == "__main__":
    main()
