"""Calls a model's network once for each line on stdin, with the modules of the checkout that PYTHONPATH names.

Started by common.network_of. It uses only what all versions have: `sample.load` and the call of a network.
"""

import sys
import tempfile

import torch

import sample


@torch.inference_mode()
def main(model: str, size: int) -> None:
    network = sample.load(model, "cpu", "bf16").network
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.full((1,), 500)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(network(x, t), file.name)
        print(file.name, flush=True)
        for _ in sys.stdin:
            network(x, t)
            print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
