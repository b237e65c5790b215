"""Train a Perceiver AR whose context is spread over processes, on the bytes of any file.

    torchrun --nproc-per-node 2 examples/context_parallel.py README.md
    torchrun --nproc-per-node 4 examples/context_parallel.py README.md --data 2 --positions 32768

The processes form ``--data`` groups. Each group sees another window of the file, and each process of a group
embeds, projects and attends to its own slice of that window. On GPUs: NCCL, one process for each.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import perceiver_kernels as pk


def main() -> None:
    """One process of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, help="what to learn")
    parser.add_argument("--positions", type=int, default=8192, help="bytes of context (default 8192)")
    parser.add_argument("--latents", type=int, default=256, help="bytes predicted at a time (default 256)")
    parser.add_argument("--data", type=int, default=1, help="windows in a step (default 1)")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    shape = (args.data, dist.get_world_size() // args.data)
    mesh = init_device_mesh(torch.device(device).type, shape, mesh_dim_names=("data", "context"))
    data, context = mesh.get_coordinate()

    text = torch.frombuffer(bytearray(args.file.read_bytes()), dtype=torch.uint8)
    text = text.repeat(-(-2 * args.positions // len(text)))  # a short file: read on from its beginning
    torch.manual_seed(0)  # the same weights everywhere
    config = pk.PerceiverARConfig(256, 128, 2, 4, args.positions, args.latents)
    model = pk.PerceiverAR(config).to(device)
    parallel = DistributedDataParallel(model)  # averages over data and context alike
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    ends = [args.positions * rank // shape[1] for rank in range(shape[1] + 1)]
    draws = torch.Generator().manual_seed(1)
    for step in range(args.steps):
        starts = torch.randint(len(text) - args.positions, (args.data,), generator=draws)
        window = text[starts[data] :][: args.positions + 1].long()
        mine = window[ends[context] : ends[context + 1]]  # its other bytes needn't be here at all
        logits = parallel(mine[None].to(device), group=mesh["context"])
        loss = F.cross_entropy(logits[0], window[-args.latents :].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0:
            print(
                f"step {step}: {loss.item() / 0.6931:.3f} bits per byte, {len(mine)} positions here",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
