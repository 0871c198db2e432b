"""Load a checkpoint of `train_gpt.py` in one ordinary process: no torchrun, no process group, any machine.

    python docs/examples/load_gpt.py --store /tmp/gpt

Two ways are shown: `ckptd.load` into a model, and `ckptd.open` for single tensors. Both hash the weights, so that they
can be compared with the digest that training printed.
"""

from __future__ import annotations

import argparse
import json

import torch
from train_gpt import GPT, SIZES, digest

import ckptd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", required=True, help="a store (its newest checkpoint) or one checkpoint in it")
    parser.add_argument("--parameters", choices=SIZES, default="10M", help="size of the model (default 10M)")
    options = parser.parse_args()

    model = GPT(SIZES[options.parameters])
    step = ckptd.load({"model": model}, options.store)

    checkpoint = ckptd.open(options.store)
    prefix = "model/"
    tensors: dict[str, torch.Tensor] = {
        key.removeprefix(prefix): checkpoint.read(key) for key in checkpoint.tensors if key.startswith(prefix)
    }
    print(json.dumps({"step": step, "loaded": digest(model.state_dict()), "read": digest(tensors)}))


if __name__ == "__main__":
    main()
