"""Fine-tune a quantized model on several processes: LoRA on frozen int8 layers, by DDP or FSDP2, on CPUs over gloo.

The text is Python's own documentation, its bytes are the tokens, and the weights start at random, so nothing is
downloaded. Run: torchrun --standalone --nproc-per-node 2 examples/two_processes.py --fsdp
"""

import argparse
import os
import pydoc_data.topics

import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import qkernels as qk

BATCH, BLOCK = 16, 64  # blocks of all processes in a step, bytes in a block

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="share the integers out; else each process has all")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same model on every process
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    report = qk.quantize_(model, options.scheme, embeddings=True)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    if rank == 0:
        print(report)

    for block in model.base_model.model.model.layers if options.fsdp else ():
        fully_shard(block)
    net = fully_shard(model) if options.fsdp else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)

    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    blocks = torch.frombuffer(bytearray(text[: len(text) // BLOCK * BLOCK]), dtype=torch.uint8).view(-1, BLOCK).long()
    order = torch.Generator().manual_seed(0)  # of the blocks: the same on every process
    for step in range(options.steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=order)].chunk(world)[rank]
        loss = net(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {mean:.3f}")
    held = sum(p.to_local().nbytes if options.fsdp else p.nbytes for p in net.parameters() if not p.requires_grad)
    print(f"process {rank} holds {held} bytes of frozen parameters", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still at work when Python ends abort the process now and then
